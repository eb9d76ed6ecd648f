"""Keys that this version has removed, but that files of earlier versions still hold.

Reading drops a removed key whose value had no effect. With any other value, a checkpoint can still be
sampled, but its run, or the output folder, cannot be continued.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Removed(NamedTuple):
    """A removed key: the value at which it had no effect, and what to use instead."""

    no_effect: Any
    instead: str


# Keys of config.json and of a checkpoint's config, and of settings.json and the settings in a PNG file.
REMOVED = {
    "data.mix_sizes": Removed(
        False, "every batch has one size; config.data.max_aspect_ratio sets which"
    ),
    "nfe_budget": Removed(None, "set the steps with --num_steps"),
}


def drop_removed(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return values by full key without removed keys, and "KEY=VALUE" of those that had an effect."""
    kept = {key: value for key, value in values.items() if key not in REMOVED}
    removed = [(key, values[key]) for key in values if key in REMOVED]
    return kept, [f"{key}={value!r}" for key, value in removed if value != REMOVED[key].no_effect]
