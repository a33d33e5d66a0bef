"""The contender that is `transformers` in one process, driven by benchmarks.harness."""

from __future__ import annotations

import time
import warnings
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
        if input_ids.is_cuda:  # `generate` itself waits for the device right after this, so it costs nothing
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class Transformers:
    """One model, and the measurements on it."""

    def __init__(self) -> None:
        self._model: Any = None  # a PreTrainedModel, whose `generate` is not typed

    def load(self, model: str, dtype: str, device: str = "cpu", int8: bool = False) -> dict[str, Any]:
        """int8: the linears' weights, and their activations as they come (torch's dynamic quantization)."""
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._model = _read(model, getattr(torch, dtype)).eval().to(device)
        if int8:
            with warnings.catch_warnings():  # it is to move to another package, which would be one more dependency
                warnings.simplefilter("ignore")
                self._model = torch.ao.quantization.quantize_dynamic(self._model, {torch.nn.Linear}, torch.qint8)
        # `generate` fills what a call leaves out from here: no end-of-sequence token, so that no answer is short
        self._model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
        return {"threads": torch.get_num_threads()}

    def answer(self, tokens: list[int], new_tokens: int, attention: str) -> dict[str, Any]:
        """Greedy, exactly `new_tokens` tokens. first_s: to the first token; rest_s: from there to the last.

        attention: transformers' own name of the implementation, "sdpa" (its default) or "eager".
        """
        output, start, times = self._generate([tokens], new_tokens, attention)
        return {
            "first_s": times[0] - start,
            "rest_s": times[-1] - times[0],
            "token_ids": output[0, len(tokens) :].tolist(),
        }

    def together(self, prompts: list[list[int]], new_tokens: int, attention: str) -> dict[str, Any]:
        """An answer to each prompt, in one batch; the prompts are of one length. seconds: until the last token."""
        _, start, times = self._generate(prompts, new_tokens, attention)
        return {"seconds": times[-1] - start, "tokens": len(prompts) * new_tokens}

    def _generate(
        self, prompts: list[list[int]], new_tokens: int, attention: str
    ) -> tuple[torch.Tensor, float, list[float]]:
        """-> prompts and answers, when it began, and when each token was there."""
        model = self._model
        if model is None:
            raise RuntimeError("nothing is loaded")
        model.set_attn_implementation(attention)
        prompt = torch.tensor(prompts, device=model.device)
        clock = Clock()
        with torch.inference_mode():
            start = time.perf_counter()
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                stopping_criteria=[clock],
            )
        return output, start, clock.times


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
    serve({"load": contender.load, "answer": contender.answer, "together": contender.together})


if __name__ == "__main__":
    main()
