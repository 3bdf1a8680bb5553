"""Checkpoints that hold quantised weights: transformers loads them by the `quantization_config` that they carry."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers.quantizers import AutoHfQuantizer

from personaspace.store.errors import InputError

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "torchao": ("torchao",),
    "quanto": ("optimum-quanto",),
    "hqq": ("hqq",),
}
"""Method -> packages without which transformers can't load it. Others need none, or transformers names them itself."""


def read_quantization(config: Any, source: str) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint's config as plain data; None where its weights are not quantised.

    Raises InputError for a method that transformers does not know: it would load such weights as if they were plain.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if found is None:
        return None
    quantization: dict[str, Any] = dict(found) if isinstance(found, dict) else found.to_dict()
    try:
        known = AutoHfQuantizer.supports_quant_method(quantization)
    except ValueError as error:
        raise InputError(f"model.id: {source}: its quantization_config can't be used: {error}") from error
    if not known:
        raise InputError(
            f"model.id: {source} is quantised by {method_of(quantization)}, which this version of transformers does "
            "not know. Use a checkpoint that is not quantised, or another version."
        )
    return quantization


def method_of(quantization: Mapping[str, Any]) -> str:
    """Name of the method, as in PACKAGES."""
    # What older versions of bitsandbytes wrote names no method.
    older = quantization.get("load_in_8bit") or quantization.get("load_in_4bit")
    return "bitsandbytes" if older else str(quantization.get("quant_method"))


def check_packages(source: str, quantization: Mapping[str, Any] | None) -> None:
    """Raise InputError, with what to install, where a package that the checkpoint's weights need is missing."""
    if quantization is None:
        return
    method = method_of(quantization)
    missing = [package for package in PACKAGES.get(method, ()) if not _is_installed(package)]
    if missing:
        raise InputError(
            f"model.id: {source} is quantised by {method}, and transformers needs {' and '.join(missing)} to load it: "
            f"pip install {' '.join(missing)}"
        )


def check_plain(source: str, quantization: Mapping[str, Any] | None, *, sharding: str) -> None:
    """Raise InputError for quantised weights, where only plain ones can be cut or moved about."""
    if quantization is not None:
        raise InputError(
            f"model.id: {source} is quantised by {method_of(quantization)}; such weights can't be used with "
            f"cluster.sharding: {sharding}. Set it to `pipeline`."
        )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
