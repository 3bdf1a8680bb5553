"""Generation by a server with OpenAI's `/completions`: prompts as token ids, and token ids back where it tells them.

A server that tells no token ids gives text, which is tokenised. Whether these are the tokens that were sampled is
checked in every way that there is (round trip, the server's count, tokenised alone and behind the prompt); where it is
in doubt, the rollout is dropped with the reason.

Nothing is promised about the same seed giving the same response: that is the server's to say.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import GenerateConfig
from personaspace.extract.endpoint import Completion, Endpoint, EndpointError, MalformedError, RefusedError, same_model
from personaspace.extract.generate.ending import end_response
from personaspace.extract.generate.engine import FinishReason, Response
from personaspace.store.errors import InputError

KEY = "generate.endpoint"
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "return_token_ids": True}
"""vLLM's own fields of a request, set so that no default of the server or its checkpoint slips in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """What a server takes and gives, found by asking for one token."""

    prompts_as_ids: bool
    """Else as text."""
    tells_ids: bool
    """It is vLLM or takes its fields, and tells the sampled token ids."""


class UncertainTokensError(Exception):
    """Nobody can tell which tokens were sampled."""


class OpenAIEngine:
    """A server that samples responses (generate.engine.Engine). ``stops`` are the model's end-of-turn ids.

    Asks for one token at the start, to see what the server takes. Raises InputError for a server that can't be used.
    """

    def __init__(self, endpoint: Endpoint, chat: ChatFormat, stops: Sequence[int], *, source: str) -> None:
        self._endpoint, self._chat, self._stops = endpoint, chat, list(stops)
        self.model = endpoint.served_model(source)
        self.manner, answer = self._probe()
        self._answers_as = answer.model
        told = "token ids" if self.manner.tells_ids else "text"
        self.maker: str | None = f"{answer.model} of a server that tells {told}"
        if not same_model(self.model, answer.model):
            raise InputError(
                f"{KEY}.model: asked for {self.model}, {endpoint.config.base_url} answers as {answer.model}. Give the "
                "name of the model that it serves, and make sure that it is the model of `model.id`."
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Response]:
        """One response for each prompt; requests go side by side. Raises EndpointError where the server fails."""
        threads = ThreadPoolExecutor(min(self._endpoint.config.concurrency, len(prompts)))
        try:
            pending = [
                threads.submit(self._respond, prompt, seed, config) for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            return [future.result() for future in pending]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _respond(self, prompt: Sequence[int], seed: int, config: GenerateConfig) -> Response:
        try:
            answer = self._ask(
                prompt,
                self.manner,
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=seed,
            )
        except RefusedError as error:
            return _unusable(f"the server refuses it: {error}")
        except (MalformedError, UncertainTokensError) as error:
            return _unusable(str(error))
        if answer.model != self._answers_as:
            raise EndpointError(
                f"{self._endpoint.config.base_url} answers as {answer.model} now, and before as {self._answers_as}. "
                "What is committed is safe; the same command resumes."
            )
        if answer.finish_reason not in ("stop", "length"):
            return _unusable(f"the server ended it with {answer.finish_reason!r}", answer.text)
        if answer.token_ids is not None:
            return end_response(self._chat, self._stops, answer.token_ids)
        try:
            token_ids = recover_tokens(self._chat, prompt, answer)
        except UncertainTokensError as error:
            return _unusable(str(error), answer.text)
        reason: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
        return Response(token_ids=token_ids, text=answer.text, finish_reason=reason)

    def _ask(self, prompt: Sequence[int], manner: Manner, **settings: Any) -> Completion:
        sent = prompt if manner.prompts_as_ids else prompt_text(self._chat, prompt)
        if manner.tells_ids:
            settings["extra_body"] = {**_NEUTRAL, "stop_token_ids": self._stops}
        if self._chat.stop_strings:
            settings["stop"] = self._chat.stop_strings
        answer = self._endpoint.complete(self.model, sent, **settings)
        if answer.prompt_tokens not in (None, len(prompt)):
            raise UncertainTokensError(
                f"the server read {answer.prompt_tokens} tokens of a prompt that has {len(prompt)}"
            )
        return answer

    def _probe(self) -> tuple[Manner, Completion]:
        prompt = self._chat.encode_prompt([{"role": "user", "content": "Who are you?"}])
        where = self._endpoint.config.base_url
        refusals = []
        for prompts_as_ids, tells_ids in ((True, True), (True, False), (False, False)):
            manner = Manner(prompts_as_ids=prompts_as_ids, tells_ids=tells_ids)
            try:
                answer = self._ask(prompt, manner, max_tokens=1, temperature=1.0)
            except RefusedError as error:
                refusals.append(str(error))
                continue
            except (MalformedError, UncertainTokensError) as error:
                raise InputError(f"{KEY}: {where} can't be used: {error}.") from None
            if answer.prompt_tokens is None and not prompts_as_ids:
                raise InputError(
                    f"{KEY}: {where} takes no token ids and does not say how many tokens it read of a prompt, so "
                    "nobody knows what the model was given. Use a server that does, such as vLLM's."
                )
            if tells_ids and answer.token_ids is None:
                continue  # It passes over fields that it does not know.
            return manner, answer
        raise InputError(f"{KEY}: {where} refuses to complete a prompt of {self.model}: {'; '.join(refusals)}.")


def prompt_text(chat: ChatFormat, prompt: Sequence[int]) -> str:
    """A prompt's text. Raises UncertainTokensError where that would be tokenised to something else."""
    text: str = chat.tokenizer.decode(list(prompt), skip_special_tokens=False)
    if chat.encode_text(text) != list(prompt):
        raise UncertainTokensError("the prompt's text would be tokenised to something else")
    return text


def recover_tokens(chat: ChatFormat, prompt: Sequence[int], answer: Completion) -> list[int]:
    """Token ids of an answer's text. Raises UncertainTokensError, with what is wrong, where they are in doubt."""
    token_ids = chat.encode_text(answer.text)
    if chat.decode(token_ids) != answer.text:
        raise UncertainTokensError("the server told no token ids, and the text, tokenised and decoded, is another one")
    try:
        before = prompt_text(chat, prompt)
    except UncertainTokensError:
        before = None  # A tokenizer that does not read its own prompts back can't be asked.
    if before is not None and chat.encode_text(before + answer.text) != [*prompt, *token_ids]:
        raise UncertainTokensError(
            "the server told no token ids, and the text is tokenised otherwise behind the prompt than alone"
        )
    counted = answer.completion_tokens
    if counted is None and before is None:
        raise UncertainTokensError("the server told neither token ids nor their number")
    if counted is not None and not _agrees(len(token_ids), counted, answer.finish_reason, bool(chat.stop_strings)):
        raise UncertainTokensError(
            f"the server told no token ids; it counted {counted} tokens, and the text has {len(token_ids)}"
        )
    return token_ids


def _agrees(found: int, counted: int, finish_reason: str, stop_strings: bool) -> bool:
    """Whether so many tokens can be what the server counted, with the tokens that ended the response."""
    if finish_reason == "length":
        return found == counted
    return found <= counted if stop_strings else counted - 1 <= found <= counted


def _unusable(reason: str, text: str = "") -> Response:
    return Response(token_ids=[], text=text, finish_reason="stop", unusable=reason)
