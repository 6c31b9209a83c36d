"""A bundle as a model of lm-eval (the Language Model Evaluation Harness), with the extra lm-eval: `--model starling`.

`python -m starling.profiling.quality.lm_eval_model ARGUMENTS` is `lm-eval ARGUMENTS` that knows this model; a program
imports this module before it calls lm_eval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from starling.engine.engine import Engine
from starling.engine.errors import UserError
from starling.engine.generation.sampling_params import SamplingParams

#: A context and its continuation as texts (None: windows of a longer text have none), then as token ids.
ScoreRequest = tuple[tuple[str, str] | None, list[int], list[int]]

#: Rows of `batch_size=auto`.
_AUTO_ROWS = 8
_SETTINGS = frozenset(field.name for field in fields(SamplingParams))
#: What lm-eval's tasks say that transformers needs, and no choice of a token depends on.
_OF_TRANSFORMERS = frozenset({"do_sample", "until", "max_gen_toks", "use_cache", "pad_token_id", "eos_token_id"})


@register_model("starling")
class StarlingLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """`pretrained` is the bundle's folder; the other arguments are those of `Engine`.

    `batch_size` rows generate together; log-likelihoods are computed on one row, in an order in which each prompt is
    prefilled as far as the one before does not begin as it does.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        backend: str = "auto",
        engine: str | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        template: str | None = None,
        device: str | None = None,
    ) -> None:
        """Load the bundle with a KV cache of `max_length` positions. `device` is lm-eval's word; `backend` chooses."""
        super().__init__()
        rows = (max_batch_size or _AUTO_ROWS) if str(batch_size).startswith("auto") else int(batch_size)
        self._engine = Engine(
            pretrained, backend=backend, engine=engine, max_seq=max_length, max_batch=rows, threads=threads
        )
        self.max_length = self._engine.max_seq
        self.batch_size, self.max_gen_toks, self._template = rows, max_gen_toks, template
        tokens = self._engine.bundle.tokens
        self._eos, self._bos = tokens.eos, tokens.bos

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos[0] if self._eos else 0

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without a context."""
        return self.eot_token_id if self._bos is None else self._bos

    @property
    def tokenizer_name(self) -> str:
        """Where lm-eval keeps requests that were tokenized for this model."""
        return str(self._engine.bundle.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; with BOS where the checkpoint puts it and the text does not begin with it."""
        tokenizer = self._engine.tokenizer
        bos = None if self._bos is None else tokenizer.id_to_token(self._bos)
        wanted = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return tokenizer.encode(string, add_special_tokens=wanted)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, by the bundle's own template or the one named `template`."""
        return self._engine.chat_templates.render(
            chat_history,
            self._engine.tokenizer,
            name=self._template,
            add_generation_prompt=add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[ScoreRequest], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation; a context that is too long loses its beginning."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Sorted, a context comes right after the one that it has most in common with.
        order = sorted(range(len(requests)), key=lambda index: requests[index][1])
        for index in tqdm(order, disable=disable_tqdm, desc="Scoring continuations"):
            text, context, continuation = requests[index]
            if continuation:
                # The last token's logits are not needed, so it takes no place in the cache.
                whole = [*context, *continuation][-self.max_length - 1 :]
                [score] = self._engine.score(whole[: -len(continuation)], [continuation])
                results[index] = (score.logprob, score.is_greedy)
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, results[index])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens where it is longer."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Scoring texts"):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scores = self._loglikelihood_tokens(
                [(None, *utils.make_disjoint_window(window)) for window in windows], disable_tqdm=True
            )
            totals.append(sum(logprob for logprob, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to a stop string, in batches of contexts with the same settings."""
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        for wanted, indices in self._by_settings(requests):
            # Of like lengths together: a batch runs until its last row ends.
            prompts = {index: self._prompt(requests[index].args[0], wanted.max_tokens) for index in indices}
            indices.sort(key=lambda index: len(prompts[index]))
            for first in range(0, len(indices), self.batch_size):
                batch = indices[first : first + self.batch_size]
                results = self._engine.generate([prompts[index] for index in batch], wanted)
                for index, result in zip(batch, results, strict=True):
                    text = postprocess_generated_text(result.text, list(wanted.stop), None)
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.update(len(batch))
        progress.close()
        return answers

    def _by_settings(self, requests: Sequence[Any]) -> Iterator[tuple[SamplingParams, list[int]]]:
        found: dict[SamplingParams, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            found[self._params(request.args[1])].append(index)
        return iter(found.items())

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        """Sampling settings by lm-eval's names. Raises UserError for one that the engine does not have."""
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        for name in settings:
            if name not in _SETTINGS | _OF_TRANSFORMERS:
                raise UserError(f"gen_kwargs has {name}, which starling does not have: leave it out")
        known = {name: value for name, value in settings.items() if name in _SETTINGS}
        stops = [text for text in settings["until"] if text]
        return SamplingParams(**known | {"max_tokens": settings["max_gen_toks"], "stop": stops})

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        return maybe_truncate(self.tok_encode(context), max_tokens, self.max_length)[0]  # type: ignore[no-any-return]


def main() -> None:
    """lm-eval's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
