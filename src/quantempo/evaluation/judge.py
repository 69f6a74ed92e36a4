"""Judge sets of images by the first: scores with bootstrap intervals, verdicts, gates."""

import operator
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np

from quantempo.errors import QuantempoError
from quantempo.evaluation.features import extract
from quantempo.evaluation.fidelity import check_pairs
from quantempo.evaluation.learned import Tools
from quantempo.evaluation.scores import distances, inception_score
from quantempo.registry import check_known

__all__ = ["ENOUGH", "interval", "judge", "parse_gate", "passed", "verdict"]

Rule = tuple[str, str, float]

_DRAWS, _LEVEL = 2000, 0.95
_RULE = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)\s*")
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
# Fewer images, or in each of four parts, say nothing about spread.
_PARTS, ENOUGH = 4, 8


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of (n,) independent values, n at least 4.

    Percentiles of 2,000 resampled means, widened about the mean by t / z sqrt(n / (n - 1)).
    Error: leaves out the true mean of normal values in 4 to 7 % of cases, from n = 4 on; of very
        skewed ones (log-normal) in up to 17 % at n = 4 and 10 % at n = 64.
    Source: Hesterberg, What teachers should know about the bootstrap, 2015, section 5.3.
    """
    count, mean = len(values), float(np.mean(values))
    rows = np.random.default_rng(seed).integers(0, count, (_DRAWS, count))
    tails = np.quantile(np.asarray(values)[rows].mean(1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    z, free = NormalDist().inv_cdf((1 + _LEVEL) / 2), count - 1
    # Student's t by its expansion in 1 / free; within 1 % from three degrees of freedom on.
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    low, high = mean + t / z * (count / free) ** 0.5 * (tails - mean)
    return float(low), float(high)


def verdict(values: np.ndarray, others: np.ndarray, higher: bool) -> dict[str, Any]:
    """Judge values by those of the same images (or parts) in another set; higher: more is better.

    A tie: the interval of the mean difference holds zero.
    """
    difference = np.asarray(values, np.float64) - others
    low, high = interval(difference)
    word = "tie" if low <= 0 <= high else "better" if (low > 0) == higher else "worse"
    return {"difference": float(difference.mean()), "low": low, "high": high, "verdict": word}


def judge(
    sets: Mapping[str, np.ndarray], tools: Tools, *, prompts: Sequence[str] = (),
    data: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score sets of pictures, (n, H, W, C) uint8 of equal seeds, by the first of them.

    Returns a dict for JSON. scores: name -> set -> value, and of measures (means over images) all
    `values` and, of ENOUGH, the interval `low` to `high`; their tail as NAME_p05, or _p95 where
    less is better; distances to the first set, and to `data` as NAME_data; the inception score.
    verdicts (`verdict`): of each two sets with a score that has an interval, or that four parts of
    sets of ENOUGH have, seeds against equal seeds.
    Raises QuantempoError: images that are not in pairs, fewer than 2.
    """
    (name, first), *others = sets.items()
    for _, images in others:
        check_pairs(first, images)
    scores, verdicts = dict[str, dict[str, Any]](), list[dict[str, Any]]()

    def compared(score: str, values: Mapping[str, Any], higher: bool) -> None:
        for a, b in combinations(values, 2):
            row = {"score": score, "of": b, "against": a}
            verdicts.append(row | verdict(np.array(values[b]), np.array(values[a]), higher))

    for score, measure in tools.measures.items():
        judged, tail = sets if measure.alone else dict(others), 5 if measure.higher else 95
        found = {n: measure.values(first, x, list(prompts)) for n, x in judged.items()}
        scores[score], ends = {}, scores.setdefault(f"{score}_p{tail:02}", {})
        for n, values in found.items():
            scores[score][n] = {"value": float(values.mean()), "values": values.tolist()}
            ends[n] = {"value": float(np.percentile(values, tail))}
            if len(first) >= ENOUGH:
                scores[score][n] |= zip(("low", "high"), interval(values), strict=True)
        if len(first) >= ENOUGH:
            compared(score, found, measure.higher)
    count = _PARTS if len(first) >= _PARTS * ENOUGH else 0
    for network in tools.extractors:
        features = {n: extract(network, images) for n, images in sets.items()}
        real = {} if data is None else {"_data": extract(network, data)}
        for end, to in {"": features[name], **real}.items():
            rows: dict[str, list[dict[str, float]]] = {}
            for n, f in features.items() if end else list(features.items())[1:]:
                parts = [slice(part, None, _PARTS) for part in range(count)]
                pairs = [(f, to), *((f[part], to if end else to[part]) for part in parts)]
                rows[n] = [distances(network, *pair) for pair in pairs]
            for score in next(iter(rows.values()))[0]:
                scores[score + end] = {n: {"value": row[0][score]} for n, row in rows.items()}
                if count:
                    pieces = {n: [part[score] for part in row[1:]] for n, row in rows.items()}
                    compared(score + end, pieces, higher=False)
        if label := network.score_names.get("inception"):
            made = {n: inception_score(f.logits)[0] for n, f in features.items()}
            scores[label] = {n: {"value": value} for n, value in made.items()}
    return {"scores": scores, "verdicts": verdicts}


def parse_gate(text: str, tools: Tools, data: bool = False) -> list[Rule]:
    """Return score, sign and limit of each part of "psnr>=40, lpips<=0.05"; data: is it given.
    Raises QuantempoError: not of this form, or a score that is none or that nothing computes.
    """
    tails = [f"{n}_p{5 if m.higher else 95:02}" for n, m in tools.measures.items()]
    kinds = [pair for e in tools.extractors for pair in e.score_names.items()]
    known, rules = [*tools.measures, *tails, *(name for _, name in kinds)], []
    known += [f"{name}_data" for kind, name in kinds if data and kind != "inception"]
    for part in text.split(",") if text.strip() else ():
        match = _RULE.fullmatch(part)
        if match is None:
            hint = 'expected "psnr>=40, ssim>0.99": scores, one of >= <= > <, numbers'
            raise QuantempoError(f"got the gate '{part.strip()}'; {hint}")
        if match[1] in tools.missing:
            raise QuantempoError(f"the gate needs {match[1]}: {tools.missing[match[1]]}")
        check_known([match[1]], known, "got a gate on the score")
        rules.append((match[1], match[2], float(match[3])))
    return rules


def passed(rule: Rule, score: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether a score of `judge` meets a rule, and whether its interval leaves it open."""
    (name, sign, limit), value = rule, score["value"]
    left = score.get("low", value) < limit < score.get("high", value)
    row = {"rule": f"{name} {sign} {limit:g}", "value": value, "open": left}
    return row | {"passed": _SIGNS[sign](value, limit)}
