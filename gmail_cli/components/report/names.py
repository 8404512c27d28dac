"""How metrics, arms and tasks are called and in which order they stand; which way a metric is better."""

from __future__ import annotations

ARMS = ("none", "texts", "generated-naive", "generated-aligned", "mixed", "real")
"""Order of the arms: from nothing learned to the real images everybody wants to match."""

ARM_NOTES = {
    "none": "no training: the encoder as it came",
    "texts": "captions alone, through the text tower",
    "generated-naive": "generated images, taken as if they were real",
    "generated-aligned": "generated images, through the aligned encoder (GMAIL)",
    "mixed": "generated and real images together",
    "real": "real images: the ceiling",
}

TASK_LABELS = {
    "clip-text": "the text tower",
    "long-clip": "the long text tower",
    "clip": "CLIP",
    "clipcap": "captioning",
    "ifcap": "captioning with retrieved captions",
    "sitta": "captioning by a linear map",
    "llava": "LLaVA",
    "linear-probe": "the linear probe",
    "features": "the image features",
    "gap": "the modality gap",
}

GAP_METRICS = (
    "paired_cosine",
    "unpaired_cosine",
    "centroid_cosine",
    "centroid_distance",
    "covariance_distance",
    "frechet_distance",
    "maximum_mean_discrepancy",
    "linear_separability",
    "neighbour_separability",
)
SET_METRICS = ("precision", "recall", "density", "coverage", "vendi_score", "real_vendi_score")
"""Metrics of the modality gap and of the generated set, shown as they are; all others are shown times 100."""

_AS_THEY_ARE = frozenset(GAP_METRICS + SET_METRICS)

FAMILIES = (
    "retrieval",
    "retrieval with extra right answers",
    "long captions",
    "classification",
    "captions",
    "questions",
)

_LABELS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
    "scienceqa_accuracy": "ScienceQA accuracy",
    "mmmu_accuracy": "MMMU accuracy",
    "paired_cosine": "cosine of a generated image with the real one of its caption",
    "unpaired_cosine": "cosine with the real image of another caption",
    "centroid_cosine": "cosine of the two means",
    "centroid_distance": "distance of the two means",
    "frechet_distance": "Fréchet distance",
    "covariance_distance": "distance of the two covariances",
    "maximum_mean_discrepancy": "maximum mean discrepancy (squared, unbiased)",
    "precision": "precision: generated images within the real set",
    "recall": "recall: real images within the generated set",
    "density": "density",
    "coverage": "coverage: real images with a generated one near",
    "vendi_score": "Vendi score: how many different images",
    "real_vendi_score": "Vendi score of the real images",
    "linear_separability": "told apart by a linear probe (0.5 = not at all)",
    "neighbour_separability": "told apart by their nearest neighbours (0.5 = not at all)",
}
_PARTS = (
    ("text_to_image", "text→image"),
    ("image_to_text", "image→text"),
    ("extended_", "ext. "),
    ("zero_shot_", "zero-shot "),
    ("nearest_neighbour_", "k-NN "),
    ("nearest_mean_", "nearest mean "),
    ("linear_probe_", "linear probe "),
    ("scienceqa_", "ScienceQA "),
    ("mmmu_", "MMMU "),
    ("top_1_accuracy", "accuracy"),
    ("top_5_accuracy", "top-5 accuracy"),
    ("mean_per_class_accuracy", "mean per class"),
    ("true_recall_at_", "true R@"),
    ("recall_at_", "R@"),
    ("mean_reciprocal_rank", "1/rank"),
    ("map_at_r", "mAP@R"),
    ("r_precision", "R-precision"),
    ("_", " "),
)


def metric_label(metric: str) -> str:
    """A metric's name for people: ``text_to_image_recall_at_5`` is ``text→image R@5``."""
    if metric in _LABELS:
        return _LABELS[metric]
    for name, label in _PARTS:
        metric = metric.replace(name, label)
    return metric


def task_label(task: str) -> str:
    """A task's name for people, to stand inside a sentence."""
    return TASK_LABELS.get(task, task)


def task_title(task: str) -> str:
    """A task's name for people, as a title."""
    title = task_label(task).removeprefix("the ")
    return title[:1].upper() + title[1:]


def family(metric: str) -> str:
    """Which of ``FAMILIES`` a task's metric belongs to: metrics of one family share a table."""
    if "_extended_" in metric:
        return "retrieval with extra right answers"
    if metric.startswith("long_"):
        return "long captions"
    if metric.startswith(("text_to_image", "image_to_text")):
        return "retrieval"
    if metric.startswith(("scienceqa_", "mmmu_")):
        return "questions"
    return "classification" if metric.endswith("_accuracy") else "captions"


def scale(metric: str) -> int:
    """What a value is multiplied with to be shown: 100 for shares and caption scores, 1 for the gap."""
    return 1 if metric in _AS_THEY_ARE else 100


def show(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A value of a metric as text: three decimals for the gap, otherwise one, with a proper minus sign."""
    if value is None:
        return "–"
    return f"{scale(metric) * value:{'+' if signed else ''}.{_digits(metric)}f}".replace("-", "−")


def _digits(metric: str) -> int:
    return 3 if metric in _AS_THEY_ARE else 1


def interval(metric: str, low: float, high: float, *, signed: bool = False) -> str:
    """``1.2 to 3.4`` in the unit the metric is shown in."""
    return f"{show(metric, low, signed=signed)} to {show(metric, high, signed=signed)}"


def side_of(difference: float) -> str:
    """On which side of what it is compared with a value lies: ``above``, ``below`` or ``equal``."""
    return "equal" if round(difference, 12) == 0 else "above" if difference > 0 else "below"


def beside(metric: str, difference: float, other: str) -> str:
    """Where a value stands beside another: ``1.2 points above no training``, ``equal to no training``."""
    if side_of(difference) == "equal":
        return f"equal to {other}"
    points, digits = scale(metric) * abs(difference), _digits(metric)
    shown = f"{points:.{digits}f}" if round(points, digits) else f"less than {10**-digits}"
    return f"{shown} points {side_of(difference)} {other}"


def arm_rank(arm: str) -> int:
    """Where an arm stands; unknown ones last."""
    return ARMS.index(arm) if arm in ARMS else len(ARMS)


def metric_rank(metric: str) -> tuple[int, int, int, str]:
    """Where a metric stands: families in their order, text-to-image before image-to-text, recalls by k, then others."""
    name, _, k = metric.rpartition("_")
    direction = next((n for n, part in enumerate(("text_to_image", "image_to_text")) if part in metric), 2)
    place = int(k) + 1000 * ("true" in name) if "recall" in name else ("top_1" not in metric) * 10_000
    return (FAMILIES.index(family(metric)), direction, place, metric)
