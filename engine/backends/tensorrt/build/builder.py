"""From a bundle to an engine plan: parse, check, build, write."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter

from starling.engine.backends.tensorrt.build.monitor import monitored
from starling.engine.backends.tensorrt.build.network import ParsedNetwork, allow_unfused_attention, parse_graph
from starling.engine.backends.tensorrt.build.network_checks import NetworkFacts, check_network
from starling.engine.backends.tensorrt.build.optimization_profiles import add_profiles, make_profiles
from starling.engine.backends.tensorrt.build.plan_stream import plan_stream
from starling.engine.backends.tensorrt.build.plan_writer import PlanWriter, check_engine_name, new_engine
from starling.engine.backends.tensorrt.build.targets import check_precision, resolve_targets
from starling.engine.backends.tensorrt.build.timing_cache import cache_file, load_timing_cache, save_timing_cache
from starling.engine.backends.tensorrt.plan_record import BundleDigests, EngineRecord, Profile
from starling.engine.backends.tensorrt.runtimes import Library, load_library
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BuildError, UserError
from starling.engine.names import DEFAULT_MAX_SEQ
from starling.engine.progress import Progress, Silent

DIALECT = "tensorrt"
DEFAULT_MAX_PREFILL = 1024


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the plan shall be.

    `runtime` None: the first of library.RUNTIMES that is installed; no `targets`: the GPU that is present; `max_seq`
    None: 2048 positions or the model's; `max_prefill` None: 1024 tokens or `max_seq`; `name` None: runtime, version,
    targets, and "greedy" for such a plan; `greedy`: without what draws tokens, so that the host draws those that are.
    """

    runtime: str | None = None
    targets: tuple[str, ...] = ()
    max_batch: int = 1
    max_prefill: int | None = None
    max_seq: int | None = None
    name: str | None = None
    force: bool = False
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class _Settings:
    """The options with everything decided."""

    targets: tuple[str, ...]
    max_batch: int
    max_prefill: int
    max_seq: int
    name: str


def build_engine(bundle: Bundle, options: BuildOptions, progress: Progress | None = None) -> EngineRecord:
    """Build an engine plan of `bundle` into its folder `engines`, where it appears whole or not at all.

    Raises:
        UserError: the bundle generates no text or is of another dialect, an option is outside its range, or the engine
            exists already.
        BackendError: the library is not installed.
        BuildError: the network would not mean what the model means, TensorRT refuses it, or the disk is too small.
    """
    progress = progress or Silent()
    if bundle.task != "generate":
        raise UserError(
            f"{bundle.folder} {bundle.task}s texts, and no backend runs TensorRT plans of such bundles: "
            f"run it on the CPU, as it is: starling score {bundle.folder} TEXT"
        )
    _require_dialect(bundle)
    if options.name is not None:
        check_engine_name(bundle.folder, options.name, force=options.force)
    library = load_library(options.runtime)
    settings = _settings(bundle, options, library)
    begin = perf_counter()
    with new_engine(bundle.folder, settings.name, force=options.force) as writer:
        writer.require_space(plan_bytes(bundle))
        needs = f"{memory_bytes(bundle) / 1e9:.1f} GB of memory and {plan_bytes(bundle) / 1e9:.1f} GB of disk"
        progress.phase(f"parsing {bundle.graph.file}; the build takes about {needs}")
        parsed = parse_graph(
            library,
            bundle.graph_path,
            max_seq=settings.max_seq,
            window=bundle.architecture.sliding_window,
            greedy=options.greedy,
        )
        facts = check_network(library, parsed.network)
        _require_caches(bundle, facts)
        if bundle.dtype == "fp32":
            allow_unfused_attention(library, parsed.network)
        profiles = make_profiles(
            parsed.network,
            max_batch=settings.max_batch,
            max_prefill=settings.max_prefill,
            max_seq=settings.max_seq,
        )
        _build(library, parsed, profiles, settings.targets, writer, progress)
        record = _record(bundle, library, settings, parsed, facts, profiles, writer, begin)
        writer.publish(record)
    return record


def plan_bytes(bundle: Bundle) -> int:
    """About the size of a plan of `bundle`, in bytes: its weights, and kernels."""
    return bundle.weights.bytes + 64 * 2**20


def memory_bytes(bundle: Bundle) -> int:
    """About the memory that a build takes, in bytes, beside the weights' own pages, which the system can take back.

    Measured with TensorRT for RTX 1.7: it holds one copy of the weights until the plan is written.
    """
    return int(1.05 * bundle.weights.bytes) + 400 * 2**20


def _require_dialect(bundle: Bundle) -> None:
    if bundle.dialect != DIALECT:
        raise UserError(
            f"{bundle.folder} is a bundle of the dialect {bundle.dialect}, which TensorRT would misread: "
            f"starling export MODEL OUT --dialect {DIALECT} --dtype fp16"
        )


def _settings(bundle: Bundle, options: BuildOptions, library: Library) -> _Settings:
    most = bundle.architecture.max_positions
    max_seq = options.max_seq or min(DEFAULT_MAX_SEQ, most)
    max_prefill = options.max_prefill or min(DEFAULT_MAX_PREFILL, max_seq)
    if not 1 <= max_seq <= most:
        raise UserError(f"--max-seq is {max_seq}, but this model has {most} positions: give 1 to {most}")
    if not 1 <= max_prefill <= max_seq:
        raise UserError(f"--max-prefill is {max_prefill}, but --max-seq is {max_seq}: give 1 to {max_seq}")
    if options.max_batch < 1:
        raise UserError(f"--max-batch is {options.max_batch}: give at least 1")
    targets = resolve_targets(library.title, library.targets, options.targets)
    scheme = None if bundle.quantization is None else bundle.quantization.scheme
    check_precision(targets, bundle.dtype, scheme)
    version = ".".join(library.version.split(".")[:3])
    name = options.name or "-".join([library.name, version, *targets, *(["greedy"] if options.greedy else [])])
    return _Settings(targets, options.max_batch, max_prefill, max_seq, name)


def _require_caches(bundle: Bundle, facts: NetworkFacts) -> None:
    """The checks see what is there; this sees what is missing."""
    layers, found = bundle.architecture.layers, facts.layers.get("ATTENTION_INPUT", 0)
    if (found, len(facts.aliases)) != (layers, 2 * layers):
        raise BuildError(
            f"{bundle.graph_path} has {found} attentions and {len(facts.aliases)} KV caches, its model {layers} layers "
            "with two caches each; export the model again"
        )


def _build(
    library: Library,
    parsed: ParsedNetwork,
    profiles: tuple[Profile, ...],
    targets: tuple[str, ...],
    writer: PlanWriter,
    progress: Progress,
) -> None:
    config = parsed.builder.create_builder_config()
    library.set_targets(config, targets)
    add_profiles(parsed.builder, config, profiles)
    timings = cache_file(library, targets) if library.has_timing_cache else None
    notes = [load_timing_cache(config, timings)] if timings else []
    stream, errors = plan_stream(library.module, writer.append)
    built = monitored(
        library,
        config,
        progress,
        lambda: parsed.builder.build_serialized_network_to_stream(parsed.network, config, stream),
    )
    for error in errors:
        raise error
    if not built:
        raise BuildError(f"{library.title} cannot build the plan: {library.last_message()}")
    if timings:
        notes.append(save_timing_cache(config, timings))
    for note in filter(None, notes):
        progress.note(note)


def _record(
    bundle: Bundle,
    library: Library,
    settings: _Settings,
    parsed: ParsedNetwork,
    facts: NetworkFacts,
    profiles: tuple[Profile, ...],
    writer: PlanWriter,
    begin: float,
) -> EngineRecord:
    return EngineRecord(
        folder=writer.folder,
        name=settings.name,
        runtime=library.name,
        runtime_version=library.version,
        targets=settings.targets,
        dtype=bundle.dtype,
        quantization=bundle.raw.get("quantization"),
        max_batch=settings.max_batch,
        max_prefill=settings.max_prefill,
        max_seq=settings.max_seq,
        profiles=profiles,
        inputs=parsed.inputs(bundle.graph.inputs),
        outputs=parsed.outputs(bundle.graph.outputs),
        aliases=facts.aliases,
        layers=facts.layers,
        build_seconds=perf_counter() - begin,
        built_from=BundleDigests.of(bundle),
        plan=writer.written(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
