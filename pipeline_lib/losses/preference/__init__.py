"""The preference losses: one formula a file, and this table. To add one, see docs/adding/loss.md."""

from pipeline_lib.registry import Table

_HERE = "pipeline_lib.losses.preference"

PREFERENCE_LOSSES = Table(
    "preference loss",
    {
        # On pairs, against a reference.
        "dpo": f"{_HERE}.dpo:Dpo",
        "robust": f"{_HERE}.robust:Robust",
        "ipo": f"{_HERE}.ipo:Ipo",
        "hinge": f"{_HERE}.hinge:Hinge",
        "length_normalized": f"{_HERE}.length_normalized:LengthNormalized",
        "r_dpo": f"{_HERE}.r_dpo:RDpo",
        "odpo": f"{_HERE}.odpo:Odpo",
        "exo": f"{_HERE}.exo:Exo",
        "nca": f"{_HERE}.nca:Nca",
        "sppo": f"{_HERE}.sppo:Sppo",
        "apo_zero": f"{_HERE}.apo_zero:ApoZero",
        "apo_down": f"{_HERE}.apo_down:ApoDown",
        # On pairs, without one.
        "simpo": f"{_HERE}.simpo:SimPo",
        "orpo": f"{_HERE}.orpo:Orpo",
        "cpo": f"{_HERE}.cpo:Cpo",
        # On the ranked responses of a prompt.
        "plackett_luce": f"{_HERE}.plackett_luce:PlackettLuce",
        "slic": f"{_HERE}.slic:Slic",
        "rrhf": f"{_HERE}.rrhf:Rrhf",
        "pro": f"{_HERE}.pro:Pro",
        # On single responses.
        "kto": f"{_HERE}.kto:Kto",
    },
)
