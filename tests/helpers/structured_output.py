"""A program: documents of 200 JSON schemas from a bundle at temperature 1, and what a grammar costs each token.

    python tests/helpers/structured_output.py BUNDLE [--schemas 200] [--rounds 12]

Each document is checked by `jsonschema`. Then the same prompt is answered with and without a grammar, taking turns, at
batch 1 and 8, greedily and drawn, and the ratio of the median inter-token latencies is printed with its quartiles.
"""

import argparse
import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jsonschema
from json_schemas import JSON_SCHEMAS

from starling.engine import Engine, GrammarSpec, SamplingParams

MOST_TOKENS = 1500
#: Long enough for a round, with strings, numbers and choices.
PEOPLE: dict[str, Any] = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "job": {"enum": ["baker", "teacher", "engineer", "none"]},
        },
        "required": ["name", "age", "job"],
        "additionalProperties": False,
    },
}


def chat(engine: Engine, text: str) -> list[int]:
    return engine.apply_chat_template([{"role": "user", "content": text}])


def count_valid(engine: Engine, names: list[str]) -> dict[str, int]:
    """How many documents are valid, invalid, and cut by the length."""
    counts = {"valid": 0, "invalid": 0, "cut": 0}
    for seed, name in enumerate(names):
        schema = JSON_SCHEMAS[name]
        prompt = chat(engine, f"Give me an example of: {name.partition('/')[0]}. Answer in JSON.")
        params = SamplingParams(
            temperature=1, seed=seed, max_tokens=MOST_TOKENS, grammar=GrammarSpec.json_schema(schema)
        )
        result = engine.generate(prompt, params, reply=True)
        if result.finish_reason != "stop":
            outcome = "cut"
        else:
            valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(result.text))
            outcome = "valid" if valid else "invalid"
        counts[outcome] += 1
        if outcome != "valid":
            print(f"{outcome}: {name}, {len(result.tokens)} tokens: {result.text[:200]}")
    return counts


def cost(engine: Engine, rows: int, temperature: float, rounds: int) -> str:
    """Ratio of the inter-token latencies with and without a grammar; the rounds take turns."""
    prompt = chat(engine, "List people of a village as JSON, with name, age and job.")
    base = SamplingParams(temperature=temperature, max_tokens=48, ignore_eos=True)
    ratios: list[float] = []
    latencies: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(rounds + 1):
        medians = {}
        for bound in (True, False) if round_ % 2 else (False, True):
            grammar = GrammarSpec.json_schema(PEOPLE) if bound else None
            params = SamplingParams(
                temperature=temperature, seed=round_, max_tokens=48, ignore_eos=base.ignore_eos, grammar=grammar
            )
            results = engine.generate([prompt] * rows, params, reply=True)
            medians[bound] = median(results[0].timings.itl_s)
            if round_:  # the first warms up
                latencies[bound] += results[0].timings.itl_s
        if round_:
            ratios.append(medians[True] / medians[False])
    low, _, high = quantiles(ratios, n=4)
    return (
        f"batch {rows}, temperature {temperature:g}: {median(latencies[True]) * 1e3:.2f} ms with, "
        f"{median(latencies[False]) * 1e3:.2f} ms without; ratio {median(ratios):.3f} ({low:.3f} to {high:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--schemas", type=int, default=len(JSON_SCHEMAS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    with Engine(options.bundle, max_batch=8, max_seq=2048, threads=options.threads) as engine:
        for rows in (1, 8) if options.rounds else ():
            for temperature in (0.0, 1.0):
                print(cost(engine, rows, temperature, options.rounds), flush=True)
        names = list(JSON_SCHEMAS)[:: max(1, len(JSON_SCHEMAS) // max(1, options.schemas))][: options.schemas]
        print(f"{len(names)} schemas: {count_valid(engine, names)}")


if __name__ == "__main__":
    main()
