"""From what the doctor measured to what it advises: plain words, with the numbers behind them."""

from octavo.measure.doctor.diagnosis import Diagnosis, Finding
from octavo.measure.doctor.inspection import Anatomy
from octavo.measure.doctor.selfcheck import SelfCheck
from octavo.quant.format import ADVISED

WIDE = 8  # a channel that many times as wide as the median is an outlier; models without any stay at 3


def findings(found: Diagnosis) -> list[Finding]:
    """Everything to know about an accepted model, most basic first."""
    anatomy, check = found.anatomy, found.self_check
    assert anatomy is not None
    assert check is not None
    own = [_binding(anatomy), _self_check(check, anatomy.dtype), _positions(anatomy), _keys(found), _outliers(found)]
    slower = [Finding("note", "processor", f"the model {what}") for what in found.slower]
    return [finding for finding in own if finding is not None] + slower + _formats(found)


def _binding(anatomy: Anatomy) -> Finding:
    told = f"{anatomy.architecture} is accepted: its {anatomy.layers} attention layers all reach Octavo's cache"
    return Finding("ok", "binding", told)


def _self_check(check: SelfCheck, dtype: str) -> Finding:
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


def _positions(anatomy: Anatomy) -> Finding | None:
    if anatomy.shift_invariant is not False:
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
    """What the rows of the table come to: which formats are fit, and what a calibration gains."""
    grades = found.grades
    rows = {grade: [name for name in ADVISED if grades[name] == grade] for grade in ("good", "usable", "poor")}
    said = [f"{grade}: {', '.join(names)}" for grade, names in rows.items() if names]
    told = "; ".join(said)
    if rows["good"]:
        verdict = Finding("ok", "formats", f"{told}: serve with --kv {rows['good'][0]}{_smallest(found, rows)}")
    elif rows["usable"]:
        advice = f"--kv {rows['usable'][0]} loses least; it shows in careful tests: measure your own task first"
        verdict = Finding("note", "formats", f"{told}: {advice}")
    else:
        advice = "stay with 16 bits, or calibrate on more text of your own and measure with `octavo accuracy`"
        verdict = Finding("warning", "formats", f"{told}: {advice}")
    return [verdict, _calibration(found)]


def _smallest(found: Diagnosis, rows: dict[str, list[str]]) -> str:
    """What to serve with where memory is scarce, if that is another format than the first."""
    least = min(rows["good"] + rows["usable"], key=lambda name: found.sizes[name])
    if least == rows["good"][0]:
        return ""
    return f"; where memory is scarce with {least} ({found.sizes[least]:.2f} of the bytes)"


def _calibration(found: Diagnosis) -> Finding:
    """What kv8 loses without one; formats with 4-bit keys make themselves a short one, and int8 cannot do without."""
    bare, own = "kv8, uncalibrated", {score.name: score.kl for score in found.formats}
    times = own[bare] / max(own["kv8"], 1e-12)
    numbers = f"kv8 loses {times:.1f} times as much and is {found.grades[bare]}"
    if found.grades[bare] == found.grades["kv8"]:
        return Finding("ok", "calibration", f"kv8 can be served without one: {numbers}")
    return Finding("note", "calibration", f"run `octavo calibrate {found.model}` first; without it {numbers}")


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
