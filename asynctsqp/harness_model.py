"""The engine as a model of lm-evaluation-harness, which must be installed: `pip install 'asynctsqp[eval]'`.

Where this module has been imported: lm_eval.simple_evaluate(model="asynctsqp", model_args={"model": DIR}, ...).
`python -m asynctsqp.evaluation` is the harness's command with it. Texts become tokens as in the harness's own
transformers backend, so that results can be compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm
from transformers import AutoTokenizer

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.engine import Engine

Likelihood = tuple[float, bool]  # natural logarithm; whether greedy decoding says the same
Window = tuple[Any, list[int], list[int]]  # what it is known by, the tokens before, the tokens that are scored
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@register_model("asynctsqp")
class AsynctsqpLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """Each kind of request opens an engine of its own and asks it all of them at once: nothing stays open between."""

    def __init__(
        self,
        model: str,
        gpu: str | None = None,
        max_gen_toks: int = 256,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **options: Any,
    ) -> None:
        """gpu: endpoint of a GPU side, or None for a local one; options: config.EngineOptions.

        The batch sizes and the device, which the harness always names, are the engine's and the GPU side's business.
        """
        super().__init__()
        checkpoint = Checkpoint.find(model)
        self._engine = Engine.launch(model, **options) if gpu is None else Engine.connect(model, gpu, **options)
        self._max_gen_toks = int(max_gen_toks)
        self.max_length = checkpoint.spec.max_positions
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        self._name = str(checkpoint.directory).replace("/", "__")

    @property
    def tokenizer_name(self) -> str:
        """What the harness knows cached requests by."""
        return self._name

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Window], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Likelihood]:
        async def ask(window: Window) -> Likelihood:
            known_by, before, scored = window
            # a context that is too long loses its beginning; the last token takes no room in it
            tokens = (before + scored)[-(self.max_length + 1) :]
            scores = (await self._engine.score(tokens, top=1))[-len(scored) :]
            answer = (
                sum(score.logprob or 0.0 for score in scores),
                all(score.top[0].token_id == score.token_id for score in scores),
            )
            if known_by is not None:
                self.cache_hook.add_partial("loglikelihood", known_by, answer)
            return answer

        return self._all(ask, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [text for (text,) in (request.args for request in requests)]
        windows = [(number, window) for number, text in enumerate(texts) for window in self._windows(text)]
        totals = [0.0] * len(texts)
        likelihoods = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        for (number, _), (logprob, _) in zip(windows, likelihoods, strict=True):
            totals[number] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> Iterable[Window]:
        """Such that each token is scored once, with as much before it as the context holds."""
        pairs = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [(None, *utils.make_disjoint_window(pair)) for pair in pairs]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        async def ask(request: Instance) -> str:
            text, asked = request.args
            sampling = normalize_gen_kwargs(asked, self._max_gen_toks)
            most, sampled = sampling.pop("max_gen_toks"), sampling.pop("do_sample")
            eos = self.tokenizer.decode(self.eot_token_id)
            sampling["stop"] = tuple(filter(None, handle_stop_sequences(sampling.pop("until", None), eos=eos)))
            sampling["temperature"] = sampling.get("temperature", 1.0) if sampled else 0.0
            tokens = self.tok_encode(text)[-max(1, self.max_length - most) :]
            done = await self._engine.complete(tokens, max_new_tokens=most, **sampling)
            self.cache_hook.add_partial("generate_until", request.args, done.text)
            return done.text

        return self._all(ask, requests, disable_tqdm)

    def _all(
        self, ask: Callable[[Asked], Awaitable[Answer]], requests: Sequence[Asked], disable_tqdm: bool
    ) -> list[Answer]:
        """The answers, in the order of the requests; the first failure ends all."""
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:

            async def one(request: Asked) -> Answer:
                answer = await ask(request)
                bar.update()
                return answer

            async def run() -> list[Answer]:
                async with self._engine:
                    try:
                        async with asyncio.TaskGroup() as group:
                            tasks = [group.create_task(one(request)) for request in requests]
                    except ExceptionGroup as failures:
                        raise failures.exceptions[0] from None
                return [task.result() for task in tasks]

            return asyncio.run(run())
