"""What all replicas say of themselves, in one document."""

from collections.abc import Mapping
from typing import Any

# Of `/cache`: what is of a block or page, or of a directory that all replicas share. All else adds up.
SHARED = ("block_", "raw_page_bytes", "raw_pages_per_session", "state_bytes_per_session", "sessions_saved")


def metrics(texts: Mapping[str, str]) -> str:
    """Prometheus' text of each replica, by its name → the same families, every sample with the label `replica`."""
    families: dict[str, list[str]] = {}
    own: list[str] = []
    for name, text in texts.items():
        for line in text.splitlines():
            if line.startswith("# HELP"):
                own = families.setdefault(line.split()[2], [])
            if line.startswith("#"):
                own += [line] if line not in own else []
            elif line:
                own.append(_labelled(line, name))
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def cache(states: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """`/cache` of each replica, by its name → sums, and beside them each one's own under `replicas`."""

    def merged(name: str, values: list[Any]) -> Any:
        numbers = [value for value in values if isinstance(value, int | float)]
        if not numbers:
            return values[0]
        return max(numbers) if name.startswith(SHARED) else sum(numbers)

    first = next(iter(states.values()))
    total = {name: merged(name, [state[name] for state in states.values()]) for name in first}
    return total | {"replicas": [{"replica": name, **state} for name, state in states.items()]}


def _labelled(sample: str, replica: str) -> str:
    name, rest = sample.split(" ", 1) if "{" not in sample else sample.split("{", 1)
    return f'{name}{{replica="{replica}",{rest}' if "{" in sample else f'{name}{{replica="{replica}"}} {rest}'
