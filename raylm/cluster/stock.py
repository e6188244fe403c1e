"""What Ray itself says of a cluster file: its schema, and what it makes of the file before it launches anything."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.cluster.file import ClusterFile, Finding
from raylm.errors import remedy_for
from raylm.progress import hushed

if TYPE_CHECKING:
    from jsonschema import ValidationError

PROVIDERS = ("local", "aws", "gcp", "azure", "external", "kuberay", "vsphere", "aliyun", "spark")
_LAUNCHED_OTHERWISE = ("kuberay",)
"""Providers whose machines Ray's launcher does not make."""


def check_shape(cluster: ClusterFile) -> Iterator[Finding]:
    """Keys and kinds of values that Ray's schema refuses, and keys of which YAML would silently take the last."""
    for key in cluster.repeated:
        yield cluster.error(key, "stands here twice; YAML takes the last one alone", "keep one of them")
    if cluster.provider and cluster.provider not in PROVIDERS:
        remedy = remedy_for(cluster.provider, PROVIDERS, f"known: {', '.join(PROVIDERS)}")
        yield cluster.error(("provider", "type"), f"Ray has no provider '{cluster.provider}'", remedy)
    import ray.autoscaler
    from jsonschema import Draft7Validator

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    errors = Draft7Validator(schema).iter_errors(cluster.values)
    for error in sorted(errors, key=lambda found: [str(part) for part in found.absolute_path]):
        yield from _told(cluster, error)


def _told(cluster: ClusterFile, error: ValidationError) -> Iterator[Finding]:
    key = tuple(error.absolute_path)
    known = list(error.schema.get("properties", {}))
    if error.validator == "additionalProperties":
        for name in sorted(set(error.instance) - set(known)):
            remedy = remedy_for(name, known, f"known here: {', '.join(sorted(known))}")
            if name == "raylm":
                remedy = "put it below metadata:, which Ray leaves alone"
            yield cluster.error((*key, name), "a key that Ray does not know", remedy)
    elif error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield cluster.error(key, f"'{name}' is missing", f"add {name}:")
    elif error.validator == "type":
        kind = {"object": "a mapping", "array": "a list", "string": "a text", "integer": "a whole number"}
        wanted = kind.get(str(error.validator_value), str(error.validator_value))
        yield cluster.error(key, f"found {error.instance!r}", f"Ray expects {wanted}")
    else:
        yield cluster.error(key, f"found {error.instance!r}: {error.message}", "mend it")


def check_prepared(cluster: ClusterFile) -> Iterator[Finding]:
    """What Ray refuses once it has filled in its defaults, of a file whose shape is right."""
    if cluster.provider in _LAUNCHED_OTHERWISE:
        return
    from ray.autoscaler._private.util import prepare_config, validate_config

    told = io.StringIO()
    filling = prepare_config.__module__  # tells of what it fills in
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), hushed(filling, logging.CRITICAL):
            validate_config(prepare_config(copy.deepcopy(cluster.values)))
    except (Exception, SystemExit) as error:  # Ray raises what it likes, and its launcher exits
        said = str(error) if not isinstance(error, SystemExit) else ""
        text = " ".join((said or told.getvalue() or type(error).__name__).split())
        yield cluster.error(_key_of(text), f"Ray refuses the file: {text}", "mend it as Ray says")


def _key_of(text: str) -> tuple[str, ...]:
    """The key that an error of Ray's is about, as far as it says so."""
    names = ("head_node_type", "available_node_types", "max_workers", "cluster_name", "provider", "docker")
    return next(((name,) for name in names if name in text), ())
