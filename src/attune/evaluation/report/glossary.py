"""The terms of the report in plain words: shown on hover, and listed at the end of the page."""

from __future__ import annotations

GLOSSARY = {
    "95 % interval": (
        "If the experiment were repeated with other prompts, an interval made this way would hold the true "
        "value in about 95 of 100 repetitions. Here: a bootstrap over prompts."
    ),
    "base": "The model before any fine-tuning. Every run is compared with it on the same prompts and the same noise.",
    "base spread": (
        "The standard deviation of the base's scores over prompts. A difference of 1 base spread is as large "
        "as the usual difference between two prompts. It lets scorers of different scales share an axis."
    ),
    "bootstrap": (
        "Prompts are drawn anew, with replacement, 10,000 times; the interval is what the mean does meanwhile "
        "(Efron and Tibshirani 1993)."
    ),
    "clipped": "The share of updates that SPO's clip range cut off.",
    "CMMD": (
        "Distance between the images of a run and those of the base, by features of a vision model "
        "(Jayasumana et al. 2024), times 1000. 0 is the same images; it says how far a run moved, not whether "
        "that is good."
    ),
    "denoiser calls": "How often the network that removes noise was evaluated, counted in images.",
    "deviation by prompts": (
        "How much the difference would vary if the same models were judged by other prompts: the standard error within "
        "a seed."
    ),
    "deviation by seeds": (
        "How much the difference varies because another seed trains another model: the deviation between seeds, "
        "without the part that prompts explain."
    ),
    "difference": "The score of a run minus that of the base on the same prompt, averaged over prompts.",
    "gap": (
        "Gain on the scorers that a run was trained on minus gain on the held-out ones, in base spreads. Near "
        "0: the gain is not one scorer's opinion."
    ),
    "held-out scorer": "A scorer that neither trained nor selected the run. Only these are independent evidence.",
    "high frequency": "The share of an image's energy above half the finest detail it can hold: grids, ringing, grain.",
    "Holm": (
        "A correction of p-values for the number of tests: the chance that any claim of the table is false "
        "stays below 5 % (Holm 1979)."
    ),
    "margin": "By how much the trained model prefers the chosen image to the rejected one, against the base.",
    "MDE": "Minimum detectable effect: the smallest true difference that this many prompts find four times in five.",
    "median": "The middle value: half of the prompts are below it.",
    "oracle": "The embedded world's truth: whether objects, colours and places of the prompt are in the image.",
    "p-value": (
        "How often chance alone would give a result at least as clear as this one. Two-sided Wilcoxon signed- "
        "rank test over prompts, corrected by Holm."
    ),
    "pairwise distance": "How different two images of a run are on average: 1 minus the cosine of their features.",
    "protocol": (
        "Everything that decides a score besides the weights: prompts, sampler, steps, guidance, seed, "
        "scorers. Scores of different protocols are never compared."
    ),
    "reward hacking": (
        "A run that pleases the scorer it was trained on and nobody else; often with less variety, burnt "
        "colours or grain."
    ),
    "saturation": "The share of pixels that are burnt or crushed: a channel at its very end.",
    "scorer": "A model or a rule that gives an image of a prompt a number; higher is better.",
    "selected by": "Early stopping or a search chose the run by this scorer, so it is no independent evidence.",
    "Spearman": (
        "Correlation of ranks: 1 if two scorers order all prompts alike, 0 if one says nothing about the other."
    ),
    "timestep": "How much noise is in the image: 0 none, 999 nothing but noise.",
    "trained on": "The run was optimised for this scorer, so it is no independent evidence.",
    "Vendi": "Vendi score: how many truly distinct images the set amounts to (Friedman and Dieng 2023).",
    "win rate": "The share of prompts on which the run scores higher than the base; ties count half.",
}
