"""From what a user writes to the folder it means."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from personaspace.store.location import check_run_name, is_local, open_folder, run_folder
from personaspace.store.remote import RemoteFolder

TRAVERSALS = ["", ".", "..", "../x", "a/b", "/etc", "a\\b", "a b", ".hidden", "-flag", "ä", "a\n", "a\x00"]


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    for location in (tmp_path / "runs", str(tmp_path / "runs"), f"file://{tmp_path}/runs", "runs", f"{tmp_path}/runs/"):
        assert open_folder(location) == LocalFolder(tmp_path / "runs")
    assert open_folder("~/runs") == LocalFolder(Path("/home/ada/runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/runs/demo",
        "s3://bucket",
        "gs://bucket/runs",
        "az://container/runs",
        "abfs://container@account.dfs.core.windows.net/runs",
        "abfss://container@account.dfs.core.windows.net/runs",
    ],
)
def test_urls_of_object_stores(url: str) -> None:
    assert open_folder(url) == open_folder(f"{url}/") == RemoteFolder(url)
    assert open_folder(url).child("demo").url == f"{url}/demo"
    assert not is_local(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:wJalrSECRET@bucket/runs",
        "s3://AKIAEXAMPLE@bucket/runs",
        "s3://wJalrSECRET:@bucket",
        "gs://user:wJalrSECRET@bucket/runs",
        "abfs://container:wJalrSECRET@account.dfs.core.windows.net/runs",
        "https://user:wJalrSECRET@example.org/runs",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError) as error:
        open_folder(url)
    assert str(error.value) == (
        f"{url.split(':')[0]}://...: the URL carries credentials. They belong into the environment "
        "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3) or the cloud SDK's own files."
    )


@pytest.mark.parametrize("tail", ["?X-Amz-Signature=wJalrSECRET", "?sv=1&sig=wJalrSECRET", "#wJalrSECRET"])
def test_queries_are_refused_and_not_repeated(tail: str) -> None:
    with pytest.raises(InputError, match=r"^az://container/runs\?\.\.\.: the URL must end with the path\.$"):
        open_folder(f"az://container/runs{tail}")


@pytest.mark.parametrize("url", ["http://example.org/runs", "ftp://host/runs", "s3:///runs", "nonsense://x"])
def test_unknown_storage_is_refused_with_what_is_allowed(url: str) -> None:
    message = (
        f"{url}: not a storage that is known; give a local path, or a URL of s3://, gs://, az://, abfs://, abfss://."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_folder(url)


@pytest.mark.parametrize("url", ["s3://[bucket/runs", "s3://key:wJalrSECRET@[bucket/runs"])
def test_a_url_that_is_none_is_one_clear_error(url: str) -> None:
    with pytest.raises(InputError) as error:
        open_folder(url)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("path", ["runs/../../secret", "./runs", "..", "runs/."])
def test_dots_in_a_url_are_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"'\.\.?' has no meaning in an object store; give the path itself\.$"):
        open_folder(f"s3://bucket/{path}")


@pytest.mark.parametrize("location", ["runs", "/shared/runs", "~/runs", "file:///shared/runs"])
def test_what_is_local(location: str) -> None:
    assert is_local(location)


@pytest.mark.parametrize("root", ["{tmp}", "s3://bucket/runs"])
@pytest.mark.parametrize("run", TRAVERSALS)
def test_run_names_that_could_leave_the_store_are_refused(tmp_path: Path, root: str, run: str) -> None:
    message = f"store.run: {run!r} is no name; use letters, digits, '.', '_' and '-', first a letter or digit."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        run_folder(root.format(tmp=tmp_path), run)
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=12) | st.from_regex(r"[A-Za-z0-9._/-]{1,8}", fullmatch=True))
def test_a_run_name_is_one_part_of_a_path(run: str) -> None:
    try:
        assert check_run_name(run) == run
    except InputError:
        return
    assert run_folder("/store", run) == LocalFolder(Path("/store") / run)
    assert (Path("/store") / run).resolve().parent == Path("/store")


def test_run_folder(tmp_path: Path) -> None:
    assert run_folder(str(tmp_path), "demo-1.2_b") == LocalFolder(tmp_path / "demo-1.2_b")
    assert run_folder("gs://bucket/runs/", "demo") == RemoteFolder("gs://bucket/runs/demo")
