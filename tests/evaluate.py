"""lm-evaluation-harness on three small tasks of local data, as a process: `python -m tests.evaluate BACKEND MODEL DIR`.

BACKEND: asynctsqp or hf (the harness's own, on transformers). Prints JSON: of each task its results, and of each of its
samples what the model said.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

FACTS = [
    ("The capital of France is", ["Paris", "London", "Berlin", "Rome"], 0),
    ("The opposite of hot is", ["warm", "cold", "blue", "fast"], 1),
    ("Two plus two equals", ["five", "three", "four", "nine"], 2),
    ("The sun rises in the", ["west", "east", "cellar", "soup"], 1),
    ("Die Hauptstadt von Österreich ist", ["Graz", "Linz", "Köln", "Wien"], 3),
]
TEXTS = [
    "It was the best of times, it was the worst of times.",
    "東京の夜は静かです。",
    "for i in range(10):\n    print(i)",
]


def tasks(directory: Path) -> list[dict[str, Any]]:
    """One task for each kind of request, with their data written to files there."""
    files = {
        "facts": [{"question": q, "choices": c, "answer": a} for q, c, a in FACTS],
        "texts": [{"text": t} for t in TEXTS],
    }
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def task(name: str, data: str, output_type: str, metric: str, **details: Any) -> dict[str, Any]:
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / f"{data}.jsonl")}},
            "test_split": "test",
            "output_type": output_type,
            "metric_list": [{"metric": metric}],
            **details,
        }

    question = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    answer = {"doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}"}
    generation = {"generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False}}
    return [
        task("choice", "facts", "multiple_choice", "acc", **question),
        task("rolling", "texts", "loglikelihood_rolling", "bits_per_byte", doc_to_text="", doc_to_target="{{text}}"),
        task("until", "facts", "generate_until", "exact_match", **answer, **generation),
    ]


def evaluate(backend: str, model: str, directory: Path) -> dict[str, Any]:
    import datasets
    import lm_eval

    arguments = {"pretrained": model, "dtype": "float32"}
    if backend == "asynctsqp":
        import_module("asynctsqp.harness_model")  # which registers the model
        arguments = {"model": model}
    datasets.config.HF_DATASETS_CACHE = str(directory / "cache")
    found = lm_eval.simple_evaluate(
        model=backend, model_args=arguments, tasks=tasks(directory), batch_size=4, device="cpu", bootstrap_iters=0
    )
    return {
        name: {"results": results, "said": [sample["resps"] for sample in found["samples"][name]]}
        for name, results in found["results"].items()
    }


if __name__ == "__main__":
    print(json.dumps(evaluate(sys.argv[1], sys.argv[2], Path(sys.argv[3])), default=str))
