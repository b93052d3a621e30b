"""Whether the Hugging Face hub can be asked, found out once and quickly.

Its client tries five times with growing pauses, which is right for a transfer that broke and half a minute of noise
where there is no network.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from llmcompress.errors import first_line

PATIENCE = 5.0
"""Seconds that the hub has for its first answer."""

RECENT = 60.0
"""Seconds for which an answer, or none, holds: a recipe may name ten texts and tasks, and each asks."""

# address → when it was asked, and what came of it
_ASKED: dict[str, tuple[float, str | None]] = {}


def hub_silence() -> str | None:
    """Why the hub does not answer, None where it does; not asked again for :data:`RECENT` seconds.

    An answer of any kind counts. Proxies of the environment are used, as the hub's own client does.
    """
    import datasets
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "the network is switched off (offline: true or HF_HUB_OFFLINE)"
    when, silence = _ASKED.get(hub.ENDPOINT, (None, None))
    if when is None or time.monotonic() - when > RECENT:
        silence = _ask(hub.ENDPOINT)
        _ASKED[hub.ENDPOINT] = time.monotonic(), silence
    return silence


def _ask(address: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"{address} does not answer ({getattr(error, 'reason', error)})"
    return None


NOT_HERE = "it is not in the cache of datasets, and "


def out_of_reach(names: Iterable[str], off: bool = False) -> dict[str, str]:
    """Data sets that cannot be had: nothing of them is in a cache, and the hub does not answer.

    Args:
        names: As ``ORG/NAME``.
        off: Whether the network must not be asked.

    Returns:
        Name → why. What is in a cache may still be the wrong split; only loading it tells.
    """
    import datasets
    import huggingface_hub.constants as hub

    wanted = dict.fromkeys(names)
    caches = {
        name: [
            Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"),
            Path(hub.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}",
        ]
        for name in wanted
    }
    absent = [name for name in wanted if not Path(name).exists() and not any(map(Path.exists, caches[name]))]
    if not absent:
        return {}
    with offline(off):
        silence = hub_silence()
    return {} if silence is None else dict.fromkeys(absent, f"{NOT_HERE}{silence}")


def why_not_loaded(error: Exception, silence: str | None) -> str:
    """In a line, why ``datasets`` could not load a data set.

    Args:
        error: What it raised.
        silence: What :func:`hub_silence` found before.
    """
    first = first_line(error)
    # other errors, such as an unknown split, say more than that nobody was asked
    if silence is not None and ("offline" in first.lower() or "hub" in first.lower()):
        return f"{NOT_HERE}{silence}"
    return first


@contextmanager
def offline(active: bool) -> Iterator[None]:
    """Keep ``datasets`` and ``huggingface_hub`` off the network while the block runs, if ``active``."""
    if not active:
        yield
        return
    import datasets
    import huggingface_hub.constants

    # the environment variables are read when those packages are imported, which has happened by now
    with (
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_DATASETS_OFFLINE", True, create=True),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield
