"""From what the doctor measured to what it advises: plain words, with the numbers behind them."""

from __future__ import annotations

from collections.abc import Callable

from octavo.measure.doctor.diagnosis import Diagnosis, Finding

WIDE = 8  # a channel that many times as wide as the median is an outlier; models without any stay at 3


def findings(found: Diagnosis) -> list[Finding]:
    """Everything to know about an accepted model, most basic first."""
    own = [_binding(found), _self_check(found), _positions(found), _keys(found), _outliers(found)]
    return [finding for finding in own if finding is not None] + _formats(found)


def _binding(found: Diagnosis) -> Finding:
    assert found.anatomy is not None
    layers, name = found.anatomy.layers, found.anatomy.architecture
    return Finding("ok", "binding", f"{name} is accepted: its {layers} attention layers all reach Octavo's cache")


def _self_check(found: Diagnosis) -> Finding:
    assert found.self_check is not None
    assert found.anatomy is not None
    check, dtype = found.self_check, found.anatomy.dtype
    numbers = (
        f"two sequences in one batch differ from each alone by {_relative(check.alone)}, and from transformers' own "
        f"attention by {_relative(check.transformers)}"
    )
    if check.passed:
        return Finding("ok", "self-check", f"{numbers}: rounding in {dtype}")
    return Finding(
        "warning", "self-check", f"{numbers}; rounding in {dtype} stays below {check.tolerance:.0e}. Do not serve this "
        "model with Octavo: its answers would depend on who else is served. Please report the architecture"
    )  # fmt: skip


def _positions(found: Diagnosis) -> Finding | None:
    assert found.anatomy is not None
    if found.anatomy.shift_invariant is not False:
        return None
    return Finding(
        "note",
        "positions",
        "attention depends on where a text stands, not only on distances: a calibration sees positions from 0 on "
        "only, so calibrate with windows as long as the sessions to be served (--calib-seqlen)",
    )


def _keys(found: Diagnosis) -> Finding | None:
    biased = [layer for layer in found.keys if layer.biased]
    if not biased:
        largest = max((layer.offset for layer in found.keys), default=0)
        return Finding(
            "ok",
            "key biases",
            f"no channel of K holds a large constant: at most {largest:.0f} times the spread of its head's channels",
        )
    worst = max(biased, key=lambda layer: layer.offset)
    where = listed([layer.layer for layer in biased])
    norms = f", key bias norm {worst.bias_norm:.0f}" if worst.bias_norm is not None else ""
    text = (
        f"in layer{'s' if len(biased) > 1 else ''} {where} a few channels of K hold a large constant (layer "
        f"{worst.layer}: {worst.channels} channels, up to {worst.offset:.0f} times the spread of the others{norms}), "
        "as in Qwen2 and Qwen2.5. One scale for a whole row gives them nearly all its steps; calibrated channels take "
        "the constant out"
    )
    return Finding("note", "key biases", text)


def _outliers(found: Diagnosis) -> Finding:
    wide = [w for w in found.widths if w.ratio > WIDE]
    worst = max(found.widths, key=lambda w: w.ratio)
    numbers = f"{worst.side} of layer {worst.layer}: the widest channel is {worst.ratio:.1f} times the median one"
    if not wide:
        return Finding("ok", "outlier channels", f"none; most in {numbers}")
    sides = "; ".join(
        f"{side} of layer{'s' if len(own) > 1 else ''} {listed(own)}"
        for side in "KV"
        if (own := [w.layer for w in wide if w.side == side])
    )
    return Finding("note", "outlier channels", f"{sides}. Most in {numbers}; calibrated channels even them out")


def _formats(found: Diagnosis) -> list[Finding]:
    """Which formats are advised: the calibrated ones, what the lack of a calibration costs, and int8."""
    scores = {score.name: score for score in found.formats}
    grades = {name: found.grade(score) for name, score in scores.items()}

    def kl(name: str) -> str:
        return f"KL {scores[name].kl:.1e}"

    def numbers(name: str) -> str:
        changed = f", {1 - scores[name].agreement:.1%} of the most likely tokens change"
        return f"--kv {name} ({found.sizes[name]:.2f} of the bytes, {kl(name)}{changed})"

    serves = [name for name in ("kv8", "k8v4", "kv4") if grades[name] != "poor"]
    if serves:
        advice = f"where memory allows {numbers(serves[0])}"
        for name in serves[1:]:
            advice += f", next {numbers(name)}"
        if grades[serves[0]] != "good":
            advice += ". They show in careful tests: measure your own task first"
        formats = Finding("ok" if grades[serves[0]] == "good" else "note", "formats", advice)
    else:
        formats = Finding(
            "warning", "formats", f"no format is close to the 16-bit cache here: {', '.join(map(numbers, scores))}. "
            "Stay with 16 bits, or calibrate on more text of your own and measure with `octavo accuracy`"
        )  # fmt: skip
    return [formats, _calibration(found, grades, kl), _static(found, grades, kl)]


def _calibration(found: Diagnosis, grades: dict[str, str], kl: Callable[[str], str]) -> Finding:
    """What kv8 and k8v4 lose without one; kv4 makes itself a short one."""
    bare = "kv8, uncalibrated"
    losses = {score.name: score.kl for score in found.formats}
    times = losses[bare] / max(losses["kv8"], 1e-12)
    numbers = f"kv8 {kl(bare)}, k8v4 {kl('k8v4, uncalibrated')}"
    command = f"`octavo calibrate {found.model}`"
    if grades[bare] == "good":
        gain = f"; {command} makes kv8's {times:.0f} times smaller" if times > 2 else f"; {command} changes little"
        return Finding("ok", "calibration", f"kv8 can be served without one ({numbers}){gain}")
    if grades["kv8"] == "good":
        text = f"do not serve kv8 or k8v4 without one ({numbers}: kv8 loses {times:.0f} times as much). Run {command}"
        return Finding("warning", "calibration", text)
    return Finding("note", "calibration", f"without one {numbers}; {command} makes one")


def _static(found: Diagnosis, grades: dict[str, str], kl: Callable[[str], str]) -> Finding:
    """int8, of a static scale, with the calibration that it cannot do without."""
    numbers = f"{kl('int8')}, one range a layer: {kl('int8, tensor × 1.0')}"
    exact = f"int8 takes exactly {found.sizes['int8']:.2f} of the bytes, and no raw rows"
    if grades["int8"] == "poor":
        return Finding("note", "int8", f"not on this model: {numbers}")
    return Finding("ok" if grades["int8"] == "good" else "note", "int8", f"{exact}, once calibrated ({numbers})")


def _relative(errors: tuple[float, float]) -> str:
    median, worst = errors
    return f"{median:.0e} (worst row {worst:.0e})" if worst else "nothing"


def listed(layers: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2 and 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}–{run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]
