"""`build`: a Ray Serve application of an ingress and replicas."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import LoRAConfigError, LoRAUnsupportedError
from .ingress import Ingress
from .settings import LEAST, Base, Settings

if TYPE_CHECKING:
    from ray.serve import Application

    from ..pool.sources import SourceLike
    from .replica import Replica

__all__ = ["app", "build"]

_FORWARDED = 1000  # requests that the ingress, which computes nothing, has open at a time
_NUMBERS = {*LEAST, "num_replicas", "num_cpus", "num_gpus", "max_ongoing_requests", "max_queued_requests"}


def build(
    base: Base,
    *,
    source: SourceLike,
    name: str | None = None,
    device_slots: int = 32,
    host_slots: int = 256,
    max_batch_size: int = 32,
    batch_wait_timeout_s: float = 0.01,
    max_new_tokens: int = 256,
    max_prompt_tokens: int | None = None,
    max_body_bytes: int = 2**20,
    pool_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Application:
    """A Ray Serve application: `serve.run(build("org/base", source="adapters/", num_replicas=2))`.

    Clients post to `/v1/completions` as to OpenAI; `model` is the adapter's id. An ingress sends each request
    to a replica that has the adapter already, if there is one. A replica keeps its adapters in a `LoRAPool`, and
    completes what arrives together, for whichever adapters, in one `generate`.

    Args:
        base: an id on the Hub or a folder; or a function that returns model and tokenizer, and is called in each
            replica.
        source: as of `LoRAPool`, also a folder, mapping or function. None lets clients name any repo, and any folder of
            the machine.
        name: what a request calls the base alone; default: `base`, if that is an id or a folder.
        device_slots, host_slots: of each replica's pool. Ray takes their sum for the adapters a replica has.
        max_batch_size, batch_wait_timeout_s: as of `serve.batch`.
        max_new_tokens, max_prompt_tokens: what a request may have at most; the base's context is a limit too.
        max_body_bytes: of an HTTP request.
        pool_options: further arguments of `LoRAPool`: max_rank, max_bytes, timeout, token, …
        options: of the replicas, as of `serve.deployment`: num_replicas, autoscaling_config, ray_actor_options, …

    Raises:
        LoRAConfigError: an impossible number. LoRAUnsupportedError: Ray Serve is not installed.
    """
    settings = Settings(
        base=base,
        source=source,
        name=name,
        device_slots=device_slots,
        host_slots=host_slots,
        max_batch_size=max_batch_size,
        batch_wait_timeout_s=batch_wait_timeout_s,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_body_bytes=max_body_bytes,
        pool_options={} if pool_options is None else pool_options,
    )
    _require_ray()
    from ray import serve

    # One batch runs while the next one gathers.
    replicas = serve.deployment(_for_ray(settings), name="LoRA", max_ongoing_requests=2 * max_batch_size)
    ingress = serve.deployment(
        Ingress, name="LoRAIngress", max_ongoing_requests=_FORWARDED, ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(replicas.options(**options).bind(settings), settings.limits)


def app(args: Mapping[str, Any]) -> Application:
    """`build` for Ray's command line and YAML: `serve run hf_lora.serve:app base=org/base source=adapters/`.

    Args:
        args: those of `build`, numbers also as text; num_cpus and num_gpus are of each replica.
    """
    given = {name: _number(value) if name in _NUMBERS else value for name, value in args.items()}
    for name in ("base", "source"):
        if name not in given:
            raise LoRAConfigError(f"{name} is missing.", name=name, remedy=f"Write {name}=….")
    resources = {name: given.pop(name) for name in ("num_cpus", "num_gpus") if name in given}
    if resources:
        options = given.get("ray_actor_options") or {}
        if not isinstance(options, Mapping):
            raise LoRAConfigError(
                f"ray_actor_options={options!r} is impossible for a deployment.",
                name="ray_actor_options",
                value=options,
                expected="a mapping",
                remedy="Write it as Ray does.",
            )
        given["ray_actor_options"] = {**options, **resources}
    return build(**given)


def _number(value: Any) -> Any:
    """The number that a text is; else what it was ("auto")."""
    for kind in (int, float):
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = kind(value)
    return value


def _for_ray(settings: Settings) -> type[Replica]:
    """The class that Ray makes replicas of. Its decorators take numbers when a class is made, so this is one a call."""
    from ray import serve

    from .replica import Replica

    class OnRay(Replica):
        hold = serve.multiplexed(max_num_models_per_replica=settings.device_slots + settings.host_slots)(Replica.hold)
        run = serve.batch(max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_timeout_s)(
            Replica.run
        )

        def __init__(self, settings: Settings) -> None:
            Replica.__init__(self, settings, serve.get_replica_context().replica_id.unique_id)

    return OnRay


def _require_ray() -> None:
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise LoRAUnsupportedError(
            f"A deployment on Ray Serve needs Ray Serve, which cannot be imported: {error}",
            name="ray",
            remedy='Type: pip install "hf_lora[serve]"',
        ) from error
