"""Which tokens are the response, for text that was not generated here (imported transcripts)."""

from collections.abc import Sequence

from personaspace.extract.chat import ChatFormat, Message
from personaspace.store.errors import PersonaspaceError


class UnstableBoundaryError(PersonaspaceError):
    """Prompt and response cannot be told apart by tokens; the rollout must not be averaged on a guess."""


def locate_response(chat: ChatFormat, messages: Sequence[Message], response: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and response of a finished conversation, without the end-of-turn token.

    The conversation is rendered and tokenised whole; the response is the tokens inside its characters. Raises
    UnstableBoundaryError where the template changes the text before it, or a token straddles its ends.
    """
    prompt_text = chat.render(messages, add_generation_prompt=True)
    full_text = chat.render([*messages, {"role": "assistant", "content": response}], add_generation_prompt=False)
    if not full_text.startswith(prompt_text):
        raise UnstableBoundaryError("the chat template renders the prompt differently once a response follows")
    start = len(prompt_text)
    stop = start + len(_written(full_text[start:], response))

    encoded = chat.tokenizer(full_text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(ids))
    last = next((i for i, (begin, _) in enumerate(offsets) if begin >= stop), len(ids))
    if first < last and (offsets[first][0] < start or offsets[last - 1][1] > stop):
        raise UnstableBoundaryError("a token straddles the boundary between response and template")
    if ids[:first] != chat.encode_text(full_text[:start]):
        raise UnstableBoundaryError("the prompt's tokens change once the response follows")
    return ids[:first], ids[first : max(first, last)]


def _written(rest: str, response: str) -> str:
    """The response as it stands at the beginning of ``rest``.

    Templates such as Llama's trim it; the plain one puts a space before it, which belongs to its first token, just
    as in a generated response.
    """
    for content in (response, response.strip(), f" {response}", f" {response.strip()}"):
        if rest.startswith(content):
            return content
    raise UnstableBoundaryError("the rendered conversation does not contain the response as written")
