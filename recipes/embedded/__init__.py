"""The recipe of the embedded family: small real models that stand in for hub checkpoints (`make embedded`)."""
