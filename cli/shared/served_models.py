"""The models that `starling serve` opens: one that generates, one that scores or embeds, or one of each."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.cli.shared.options import refuse_options
from starling.engine.errors import UserError

if TYPE_CHECKING:
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.engine import Engine
    from starling.serving.http.request_bodies import Limits
    from starling.serving.http.scoring_service import ScoringService
    from starling.serving.http.served import Served
    from starling.serving.http.service import Service

LOGGER = logging.getLogger("starling.serve")


def open_served(stack: ExitStack, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> Served:
    """Open the bundle in `folder`, and that of --reward-model; `stack` closes them.

    Raises UserError where the two do not go together, or an option means nothing to them.
    """
    from starling.engine.bundle.manifest import Bundle
    from starling.serving.http.served import Served

    main = Bundle.open(folder, verify=settings["verify"])
    reward = options["reward_model"]
    names = tuple(options["model_name"]) or (_name(main),)
    if main.task != "generate":
        if reward is not None:
            raise UserError(f"--reward-model stands beside a model that generates text, which {folder} does not")
        refuse_options(
            ["max_prompt", "prefill_chunk", "prefix_cache", "isolate", "kv_dtype"],
            "is about generating text, which this bundle does not",
        )
        return Served(None, _scoring(stack, main, settings, options, names))
    second = None
    if reward is not None:
        second = Bundle.open(reward, verify=settings["verify"]).require("score")
        if _name(second) in names:
            raise UserError(f"both models are called {_name(second)}: give --model-name for the other one")
    scoring = None
    if second is not None:
        cpu = {name: settings[name] for name in ("threads", "verify")}
        scoring = _scoring(stack, second, cpu, options, (_name(second),))
    return Served(_generating(stack, main, settings, options, names, _judges(second)), scoring)


def _judges(reward: Bundle | None) -> tuple[str, ...]:
    """The name of a model that gives one score of a text, which can say which answer is the best."""
    return (_name(reward),) if reward is not None and reward.output_width == 1 else ()


def _name(bundle: Bundle) -> str:
    return bundle.folder.resolve().name


def _generating(
    stack: ExitStack,
    bundle: Bundle,
    settings: dict[str, Any],
    options: dict[str, Any],
    names: tuple[str, ...],
    judges: tuple[str, ...],
) -> Service:
    from starling.engine.serving_loop import ServingLoop
    from starling.serving.http.service import Service

    engine = _engine(stack, bundle, settings, options)
    loop = ServingLoop(
        engine,
        queue_limit=options["max_queue"],
        prefill_chunk=options["prefill_chunk"],
        prefix_cache=options["prefix_cache"],
    )
    stack.callback(loop.close, drain=False)
    service = Service(engine, loop, replace(_limits(engine, options, names), reward_models=judges))
    stack.callback(service.close)
    return service


def _scoring(
    stack: ExitStack, bundle: Bundle, settings: dict[str, Any], options: dict[str, Any], names: tuple[str, ...]
) -> ScoringService:
    from starling.engine.pooling_loop import PoolingLoop
    from starling.serving.http.scoring_service import ScoringService

    engine = _engine(stack, bundle, settings, options)
    loop = stack.enter_context(PoolingLoop(engine, queue_limit=options["max_queue"]))
    service = ScoringService(engine, loop, names)
    stack.callback(service.close)
    return service


def _engine(stack: ExitStack, bundle: Bundle, settings: dict[str, Any], options: dict[str, Any]) -> Engine:
    from starling.engine.engine import Engine

    engine = stack.enter_context(Engine(bundle, max_batch=options["max_batch"], **settings))
    for text in (engine.model.note, engine.model.kernels_note):
        if text is not None:
            LOGGER.warning(text)
    return engine


def _limits(engine: Engine, options: dict[str, Any], names: tuple[str, ...]) -> Limits:
    from starling.serving.api.sampling_fields import MOST_CHOICES
    from starling.serving.http.request_bodies import API_DEFAULTS, Limits

    most = options["max_prompt"] or engine.max_seq
    if most > engine.max_seq:
        raise UserError(f"--max-prompt is {most}, but the KV cache has {engine.max_seq} positions: raise --max-seq")
    own = {name: engine.bundle.generation.get(name) for name in API_DEFAULTS}
    return Limits(
        models=names,
        max_seq=engine.max_seq,
        max_prompt=most,
        max_choices=min(MOST_CHOICES, options["max_batch"] + options["max_queue"]),
        strict=options["strict"],
        isolate=options["isolate"],
        defaults=API_DEFAULTS | {name: value for name, value in own.items() if value is not None},
    )
