"""Decide what each layer becomes, with the reason where it is not int8."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from quantempo.errors import QuantempoError
from quantempo.models.layers import ROLES, Site, check_roles
from quantempo.quantized.swap import LayerPlan
from quantempo.recipe import Recipe, parse_bits
from quantempo.registry import nearest

__all__ = ["check_bits", "plan_layers"]

_REASONS = {
    "input": "input layer: reads x_t itself, a fraction of a percent of the work",
    "output": "output layer: its error goes straight into the image",
    "time": "time embedding: one row a step, error would reach every block",
}


def plan_layers(sites: list[Site], recipe: Recipe) -> list[LayerPlan]:
    """Return one plan per site, `buckets` still 1 (the search decides).

    Kept in float, in this order of reasons: what no integer kernel takes; names that match
    `exclude`; roles in `float_roles`. Linear layers of the time embedding are stored in float16.

    Raises:
        QuantempoError: unknown role.
    """
    settings = recipe.layers
    check_roles(settings.float_roles)
    plans = []
    for site in sites:
        pattern = next((p for p in settings.exclude if fnmatchcase(site.name, p)), None)
        if site.unsupported is not None:
            plans.append(LayerPlan(site.name, "float", reason=site.unsupported))
        elif pattern is not None:
            plans.append(LayerPlan(site.name, "float", reason=f"excluded by '{pattern}'"))
        elif site.role in settings.float_roles:
            stored = site.role == "time" and isinstance(site.layer, nn.Linear)
            reason = _REASONS.get(site.role, f"role '{site.role}' is kept in float by the recipe")
            plans.append(LayerPlan(site.name, "float16" if stored else "float", reason=reason))
        else:
            segments = site.segments if settings.split_skips else ()
            plans.append(LayerPlan(site.name, "int8", segments, 1, None, *_bits(site, recipe)))
    return plans


def check_bits(sites: list[Site], recipe: Recipe) -> None:
    """Raise QuantempoError for a key of `layers.bits` that is no role and matches no layer."""
    for key in recipe.layers.bits:
        if key not in ROLES and not any(fnmatchcase(site.name, key) for site in sites):
            raise QuantempoError(
                f"layers.bits has '{key}', which is no role and matches no layer of this model"
                f"{nearest(key, list(ROLES))} (roles: {', '.join(ROLES)})"
            )


def _bits(site: Site, recipe: Recipe) -> tuple[int, int]:
    """Return (weight bits, activation bits): of its name's first match, of its role, or common."""
    for key, text in recipe.layers.bits.items():
        if key not in ROLES and fnmatchcase(site.name, key):
            return parse_bits(text, key)
    if site.role in recipe.layers.bits:
        return parse_bits(recipe.layers.bits[site.role], site.role)
    return recipe.weights.bits, recipe.activations.bits
