"""The contender that is `transformers` in one process, driven by benchmarks.harness."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.utils import logging as transformers_logging

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.random_weights import PREFIX
from benchmarks.worker import serve


class Clock(StoppingCriteria):
    """Never stops anything; notes when each token was there.

    This is how decode is timed: the time from the first to the last token of one answer. The other way, a long
    answer's time less a one-token answer's, subtracts two noisy numbers and books the fixed cost of `generate`
    and of the prompt in whichever of them was slower. The call costs some 10 us a token; a streamer, which a
    user would need to see the tokens as they come, costs more.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)  # type: ignore[return-value]


class Transformers:
    """One model, and the measurements on it."""

    def __init__(self) -> None:
        self._model: Any = None  # a PreTrainedModel, whose `generate` is not typed

    def load(self, model: str, dtype: str) -> dict[str, Any]:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._model = _read(model, getattr(torch, dtype)).eval()
        # `generate` fills what a call leaves out from here: no end-of-sequence token, so that no answer is short
        self._model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
        return {"threads": torch.get_num_threads()}

    def answer(self, tokens: list[int], new_tokens: int, attention: str) -> dict[str, Any]:
        """Greedy, exactly `new_tokens` tokens. first_s: to the first token; rest_s: from there to the last.

        attention: transformers' own name of the implementation, "sdpa" (its default) or "eager".
        """
        model = self._model
        if model is None:
            raise RuntimeError("nothing is loaded")
        model.set_attn_implementation(attention)
        prompt = torch.tensor([tokens])
        clock = Clock()
        with torch.inference_mode():
            start = time.perf_counter()
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                stopping_criteria=[clock],
            )
        return {
            "first_s": clock.times[0] - start,
            "rest_s": clock.times[-1] - clock.times[0],
            "token_ids": output[0, len(tokens) :].tolist(),
        }


def _read(model: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """By transformers' own reader, but for random weights: of those there is no file."""
    if not model.startswith(PREFIX):
        return LlamaForCausalLM.from_pretrained(model, dtype=dtype)
    checkpoint = Checkpoint.find(model)
    config = LlamaConfig.from_pretrained(checkpoint.directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def main() -> None:
    contender = Transformers()
    serve({"load": contender.load, "answer": contender.answer})


if __name__ == "__main__":
    main()
