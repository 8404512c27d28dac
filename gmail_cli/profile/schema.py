"""Every section of a profile and its keys; the docstring under each field is its reference.

`docs/reference/profile.md` is generated from them. `[generate]` is in `generation.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from gmail_cli.profile.generation import Generate
from gmail_cli.profile.values import (
    TEMPLATE_SETS,
    Count,
    Fraction,
    Limit,
    Listed,
    NonNegative,
    Positive,
    Revision,
    Section,
    Strings,
)

TaskName = Literal[
    "clip-text",
    "long-clip",
    "clip",
    "clipcap",
    "ifcap",
    "sitta",
    "llava",
    "linear-probe",
    "autoencoder",
    "latent-diffusion",
    "causal-lm",
]
ArmName = Literal["none", "texts", "real", "generated-naive", "generated-aligned", "mixed"]
IndexKind = Literal["auto", "flat", "hnsw", "ivf-flat", "ivf-sq8", "ivf-pq", "ivf-pq-fastscan", "ivf-opq", "ivf-rabitq"]
StageName = Literal["generate", "align", "train", "embed", "index", "eval"]


class Data(Section):
    """Where captions and images come from."""

    train: str = "scenes:train"
    """Captions (and real images) to generate from, align and train with: a file, folder, glob, or `scenes:train`."""
    train_images: str = ""
    """Folder of the real training images, where the captions file only names them. Empty: beside the file."""
    test: str = "scenes:test"
    """Real images and captions to evaluate on; never generated from."""
    test_images: str = ""
    """Folder of the real test images, where the captions file only names them. Empty: beside the file."""
    format: Literal[
        "auto", "coco", "karpathy", "table", "jsonl", "parquet", "webdataset", "text", "token", "folder", "scenes"
    ] = "auto"
    """Format of `train` and `test`; `auto` goes by the name and the content."""
    train_split: str = ""
    """Split to take from a file that holds several (Karpathy JSON, JSON records with `split`): `train`,
    `train+restval`, `val`, `test`."""
    test_split: str = ""
    """Split to take for `test`."""
    train_kind: Literal["short", "long"] = "short"
    """What the captions of `train` are, where its records do not tell (`caption` and `long_caption`): short, or long as
    those of ShareGPT4V, DOCCI, DCI and ImageInWords."""
    test_kind: Literal["short", "long"] = "short"
    """What the captions of `test` are; a `protocol` knows it."""
    train_limit: Limit = 0
    """Use the first N training images with all their captions; 0 uses all (for `scenes:` a number is needed)."""
    test_limit: Limit = 0
    """Use the first N test images with all their captions; 0 uses all (for `scenes:` a number is needed)."""
    holdout: Fraction = 0.0
    """Share of images, chosen by a hash of their id, that `test` keeps and `train` leaves when both name one source;
    `seed` does not move it."""
    scene_seed: int = 0
    """Seed of the built-in world."""
    scene_size: Annotated[int, Field(ge=16, le=1024)] = 64
    """Side of a rendered scene, pixels."""
    class_names: str = ""
    """What prompts call the classes of `test`, where its labels are numbers or WordNet ids: a text file with one name a
    line (`classnames.txt` of CLIP_benchmark), or `openai-imagenet`. Empty: the labels."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What a bad record does: stop and name it, or be left out and counted."""
    protocol: str = ""
    """Name and version of the evaluation protocol; written into every result row. A known name (`coco-karpathy-5k`,
    `coco-karpathy-1k-folds`, `coco-val2017-5k`, `flickr30k-1k`, `flickr30k-31k`, `flickr8k-1k`, `sharegpt4v-1k`,
    `urban-1k`, `dci`, `docci-5k`, `iiw-612`) holds the test set to its rule: the number of images, the captions used,
    the folds; or of zero-shot classification (`imagenet-1k`, `dtd`, `stanford-cars`, `sun397`, `sun397-partition-1`,
    `food-101`, `fgvc-aircraft`, `oxford-pets`, `caltech-101`) the number of images and classes, and which accuracy
    models are compared on. Any other label, such as `scenes-1k/1`, is only recorded."""


class Model(Section):
    """The frozen real-image encoder f_r and the text tower beside it."""

    clip: str = "tiny"
    """CLIP to start from: `tiny` (shipped), a local folder in open_clip's or transformers' format (CLIP, SigLIP; DINOv2
    and ViT as towers of images alone), `hf-hub:owner/name` of either, or `ARCH/pretrained-tag`."""
    revision: Revision = ""
    """Commit of a hub model; required for `hf-hub:owner/name`, so that artifacts say which weights embedded."""


TERMS = ("eq1", "symmetric", "cosine", "siglip", "stablerep", "text", "real-text", "hycd", "rafa", "coral", "mmd")
"""What ``align.objective`` may add up."""
_TERM = rf"(\d+(\.\d+)?\*)?({'|'.join(TERMS)})"


class Align(Section):
    """f_g: a copy of f_r tuned until f_g(generated) meets f_r(real) (paper, section 3.2, Eq. 1)."""

    objective: Annotated[str, Field(pattern=rf"^(paper|recommended|{_TERM}(\+{_TERM})*)$")] = "paper"
    """What to minimise. `paper` is Eq. 1 and nothing else; `recommended` is what served best in docs/experiments.md.

    Or a weighted sum of terms such as `cosine+0.5*eq1`: `eq1`, `symmetric` (Eq. 1 both ways), `cosine` (1 - cosine to
    the partner, no negatives), `siglip` (each pair on its own), `stablerep` (images of one caption find one another),
    `text` and `real-text` (CLIP's loss of generated, of real images through f_g with their captions), `hycd` and `rafa`
    (CLIP-Refine), `coral` (means and covariances), `mmd` (kernel mean discrepancy)."""
    temperature: Positive = 0.07
    """Temperature of `eq1`, `symmetric` and `stablerep`."""
    learn_temperature: bool = False
    """Learn that temperature, starting from `temperature`."""
    bank: Limit = 0
    """Real images from beyond the batch that are negatives in `eq1`, `symmetric` and `siglip` too, drawn anew each
    step; as many as there are takes them all. f_r is frozen, so their embeddings are at hand."""
    pairing: Literal["auto", "caption", "random", "nearest", "optimal-transport", "unpaired"] = "auto"
    """The real partner of a generated image: the image its caption describes (`caption`), or a real image of the same
    caption text or class: a `random` one each step, the `nearest` under f_r, or one to one by `optimal-transport`.
    `auto` is `caption` where those images are at hand, else `random`. `unpaired` takes any real images, for captions
    that no real image has; only for objectives without partners."""
    false_negatives: Literal["mask", "mask-caption", "keep"] = "mask"
    """Real images of a batch that are no negatives in `eq1`: the same partner (`mask`), also the same caption text
    (`mask-caption`), or none (`keep`)."""
    method: Literal["lora", "dora", "full", "projection"] = "lora"
    """Train a low-rank update (`dora`: with the lengths of the weights' rows apart), every weight of the tower (paper,
    Table 11), or its last projection only."""
    lora_rank: Count = 4
    """Rank of the update (the paper's 4)."""
    lora_alpha: Positive = 8.0
    """The update is scaled by `lora_alpha / lora_rank`."""
    lora_rank_stabilised: bool = False
    """Scale by `lora_alpha / sqrt(lora_rank)` (rsLoRA), so that the rank does not set the pace."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each tuned module's inputs that the update does not see in a step."""
    lora_targets: Strings = ()
    """Modules to tune, as peft matches them; empty takes a transformer's attention and MLP, a ResNet's convolutions."""
    steps: Count = 1000
    """Optimiser steps."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Pairs per step; `eq1` has one less negatives."""
    chunk: Limit = 0
    """Images of a batch that go through the tower at a time (GradCache): memory is that of a chunk, the loss that of
    the whole batch, at the price of a second forward pass. 0 takes all at once. Moves the last bits, as the batch size
    does."""
    lr: Positive = 1e-4
    """Highest learning rate of AdamW."""
    weight_decay: NonNegative = 0.01
    """AdamW's decay of matrices."""
    schedule: Literal["cosine-restarts", "cosine", "constant"] = "cosine-restarts"
    """Shape of the learning rate; the paper uses cosine with warm restarts."""
    cycles: Count = 4
    """Cosine cycles of `cosine-restarts`."""
    warmup: Limit = 0
    """Steps over which the learning rate first rises."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient."""
    compile: bool = False
    """Compile the blocks of the tower by `torch.compile` at the first step; needs a C++ compiler (and Triton, on a
    GPU). Moves the last bits."""
    validation: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    """Share of the images, with all that belongs to them, kept out of training to judge alignment by; 0 for none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers; weights stay fp32. bf16 needs a GPU, or a CPU with AVX-512."""


class Train(Section):
    """Downstream models trained on real or generated images, at equal steps (paper, Algorithm 1)."""

    tasks: Annotated[tuple[TaskName, ...], Listed, Field(min_length=1)] = ("clip-text",)
    """What to train: a text tower, one for long captions, a whole CLIP, a captioner, one that reads retrieved captions,
    a linear map to a language model (fitted without steps), a LLaVA-style model, a class probe; or the parts of a
    small generator."""
    arms: Annotated[tuple[ArmName, ...], Listed, Field(min_length=1)] = (
        "none",
        "real",
        "generated-naive",
        "generated-aligned",
    )
    """Images to train on: none; real through f_r; generated through f_r (naive) or f_g (aligned); real and aligned; or,
    for `clipcap` and `ifcap`, the captions' own text embeddings in place of images (`texts`)."""
    seeds: Annotated[tuple[int, ...], Listed, Field(min_length=1)] = (0,)
    """Seeds of initial weights and data order; one cell for each. Arm `none` has one cell, for the first seed."""
    kinds: Annotated[tuple[Literal["short", "long"], ...], Listed, Field(min_length=1)] = ("short",)
    """Kinds of captions to train on."""
    steps: Count = 1000
    """Optimiser steps of every cell."""
    batch_size: Count = 256
    """Captions per step (the paper: 256)."""
    lr: Positive = 1e-4
    """Highest learning rate (the paper: 1e-4)."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay of matrices (the paper: 0.01)."""
    schedule: Literal["cosine", "cosine-restarts", "constant"] = "cosine"
    """Learning rate after the warm-up (the paper restarts)."""
    cycles: Count = 4
    """Cosine cycles of `cosine-restarts`."""
    warmup: Limit = 0
    """Steps over which the learning rate rises."""
    clip_norm: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the average of the parameters that is kept in the end; 0 keeps the last parameters."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes under autocast, on a GPU or a CPU with AVX-512; weights stay fp32."""
    compile: bool = False
    """`clip-text`, `long-clip`, `clip`, `clipcap`, `ifcap`, `llava`: compile the blocks of the model by `torch.compile`
    at the first steps; needs a C++ compiler (and Triton, on a GPU). Moves the last bits."""
    mix_ratio: Fraction = 0.5
    """Arm `mixed`: probability that a caption is seen with its real image."""
    dual_projection: Literal["off", "on", "both"] = "off"
    """A projection for each flow before the head (`clipcap`, `linear-probe`), or a projector for each (`llava`); `both`
    trains cells without and with."""
    architecture: str = ""
    """`clip`: open_clip config to train from random weights: a JSON file (here, or a shipped one), or a name such as
    ViT-B-32; empty fine-tunes f_r. One with `init_logit_bias` is trained by SigLIP's loss."""
    vocabulary: Annotated[int, Field(ge=0)] = 0
    """`clip` from random weights: entries of a tokenizer learned from the captions; 0 takes CLIP's own."""
    augment: Literal["none", "crop", "crop-flip"] = "none"
    """`clip`: random shifts; `crop-flip` also mirrors (wrong where captions speak of left and right)."""
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """`clip`: share of patches left out during the first three quarters of the steps; vision transformers only."""
    class_weight: NonNegative = 0.0
    """`clip`: weight of a second loss in which each image tells its class from the others by their prompts; needs
    classes."""
    context_length: Count = 248
    """`long-clip`: tokens the text tower reads."""
    positions: Literal["stretched", "rotary"] = "stretched"
    """`long-clip`: stretch the tower's positions to `context_length` (Long-CLIP), or replace them by rotary ones
    (TULIP), which plain open_clip does not load. Arm `none`, untrained, is always stretched."""
    keep_positions: Count = 20
    """`long-clip`, stretched: first positions that stay as they are."""
    distil_share: Fraction = 0.3
    """`long-clip`, rotary: share of the steps in which the new tower learns to say what the old one says of the
    captions, cut to what that reads; the schedule starts anew after them."""
    short_weight: NonNegative = 1.0
    """`long-clip`: weight of the loss of short texts against coarse image embeddings; 0 leaves it out."""
    short_texts: Literal["captions", "sentences", "both"] = "captions"
    """`long-clip`: short texts are the image's short captions, sentences of the long one, or both; one is drawn each
    time."""
    coarse_components: Limit = 32
    """`long-clip`: principal components of a batch's image embeddings that short texts meet; 0 shows them all."""
    image_size: Annotated[int, Field(ge=16, multiple_of=16)] = 64
    """`autoencoder`, `latent-diffusion`: side of the images, pixels; a multiple of 16."""
    autoencoder: str = "tiny"
    """`latent-diffusion`: autoencoder to draw with: `tiny` (shipped) or a folder in diffusers format."""
    lm: str = "tiny"
    """`clipcap`, `ifcap`, `sitta`, `llava`: causal language model: `tiny` (shipped), a folder in transformers format,
    or a hub id."""
    lm_revision: Revision = ""
    """Commit of a hub language model; required for one."""
    tune_lm: bool = False
    """`clipcap`, `ifcap`: train the language model too."""
    shots: Limit = 0
    """`linear-probe`: train on so many images of each class, drawn by the cell's seed (few-shot); 0 takes all."""
    prefix_length: Count = 8
    """`clipcap`, `ifcap`: prefix embeddings per image."""
    mapping: Literal["mlp", "transformer"] = "mlp"
    """`clipcap`, `ifcap`: network from embedding to prefix."""
    caption_tokens: Annotated[int, Field(ge=2)] = 64
    """`clipcap`, `ifcap`, `llava`: longer captions are cut."""
    text_noise: NonNegative = 0.05
    """`clipcap`, `ifcap` on arm `texts`: standard deviation of the Gaussian noise on every component of a unit text
    embedding (CapDec)."""
    text_memory: Limit = 0
    """`clipcap` on arm `texts`: keep the embeddings of the first N different captions; an image is then seen as the
    average of them, weighted by its similarity to each (DeCap). 0 sees the image as it is."""
    caption_memory: Limit = 0
    """`ifcap`: keep the first N different captions to retrieve from; 0 keeps all."""
    retrieved_captions: Count = 5
    """`ifcap`: captions whose embeddings are fused with that of an image or text."""
    retrieval_noise: NonNegative = 0.2
    """`ifcap` on arm `texts`: standard deviation of the Gaussian noise with which a text looks for captions, as on
    every component of a unit embedding."""
    filtered_captions: Count = 9
    """`ifcap`: captions among which an image's words are counted."""
    word_drop: Fraction = 0.4
    """`ifcap`: probability that a word of the caption is left out of the sentence in front of it, in training."""
    linear_map: Literal["least-squares", "procrustes"] = "least-squares"
    """`sitta`: how the map from image to token embeddings is fitted; `procrustes` gives an orthogonal one."""
    retrieved_tokens: Count = 8
    """`sitta`: tokens nearest to an image that prompt the language model."""
    token_orders: Count = 40
    """`sitta`: orders of these tokens that are tried for each image; of the captions the one closest to the image by
    CLIP is taken."""
    visual: Literal["patches", "pooled"] = "patches"
    """`llava`: what it sees of an image: patch tokens (a vision transformer's last layer but one, the last feature map
    of other towers), or the embedding as the one token."""
    visual_grid: Limit = 0
    """`llava`: average the patches to so many rows and columns of tokens; 0 keeps them all."""
    pretrain_share: Fraction = 0.3
    """`llava`: share of the steps in which the projector alone learns from captions; in the others it learns from
    conversations together with LoRA of the language model."""
    conversations: str = ""
    """`llava`: LLaVA's conversation JSON about the training images. Empty: each caption answers `prompt`."""
    prompt: str = "Describe the image in one sentence."
    """`llava`: what `gmail eval` asks for a caption with."""
    conversation_tokens: Annotated[int, Field(ge=8)] = 2048
    """`llava`: longer conversations are cut, image tokens included; no more than the language model reads."""
    instruct_lr: NonNegative = 0.0
    """`llava`: highest learning rate while it learns from conversations; 0 takes `lr`."""
    lora_rank: Count = 16
    """`llava`: rank of the update of the language model's linear layers."""
    lora_alpha: Positive = 32.0
    """`llava`: the update is scaled by `lora_alpha / lora_rank`."""


class Embed(Section):
    """Unit embeddings with their ids."""

    flow: Literal["real", "generated"] = "real"
    """What the images of `data.test` are, and so what they go through: `real` ones through f_r, `generated` ones
    through f_g of the align artifact (paper, Algorithm 1, step 4). A generated set is embedded alone, without the
    tables of trained models and of the modality gap, and `gmail eval` refuses to test on it."""
    real_encoder: Literal["original", "tuned"] = "original"
    """What real images go through at evaluation: f_r (paper, Fig. 1 and Algorithm 1), or f_g as one sentence of its
    section 3.2 has it."""
    templates: Annotated[Strings, Field(min_length=1)] = ("a photo of a {}.",)
    """Prompts of zero-shot classification; `{}` stands for the class name, and their embeddings are averaged. A
    set that comes with open_clip can be named (`openai-imagenet`: CLIP's 80, `simple-imagenet`: 7), or a `.txt` file
    with one a line, as CLIP_benchmark's `zeroshot_classification_templates.txt`."""
    gap_count: Limit = 1000
    """Pairs of real and generated images to measure the modality gap on (paper, Table 14 and Fig. 3); 0 for none."""
    train_count: Limit = 0
    """Labelled images of `data.train`, evenly spaced, to embed beside a labelled test set: `gmail eval` then gives the
    accuracy of k-NN, nearest mean and linear probe on the features of each image tower. 0 for none."""
    batch_size: Count = 256
    """Images or texts per forward pass."""
    shard_rows: Count = 4096
    """Rows that are embedded and written to disk together: what a killed run loses at most, what `--shard` deals out,
    and the texts among which those of like length are found. A multiple of `batch_size` wastes nothing."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of stored vectors; they are normalised in float32 first."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers. `bf16` also rounds their weights, and needs a GPU or a CPU with AVX-512; vectors are
    normalised in fp32."""

    @field_validator("templates")
    @classmethod
    def _name_the_class(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1 and template not in TEMPLATE_SETS and not template.endswith(".txt"):
                sets = ", ".join(TEMPLATE_SETS)
                raise ValueError(f"template {template!r} must hold {{}} once, for the class name, or be one of: {sets}")
        return templates


class Index(Section):
    """FAISS indexes over embeddings."""

    kind: IndexKind = "auto"
    """Kind of index. `auto` is exact (`flat`) up to 200,000 vectors if the limits allow; otherwise it builds the kinds
    that fit, measures them, and takes the fastest that keeps to the limits."""
    recall_target: Fraction = 0.95
    """Recall@10 against exact search: an approximate index searches hard enough to reach it, and `auto` takes none
    that does not."""
    max_memory: NonNegative = 0.0
    """Most memory an index may take when it is loaded, MiB; 0 for no limit."""
    max_latency: NonNegative = 0.0
    """Most time a query searched alone may take on this machine, milliseconds; 0 for no limit."""
    storage: Literal["memory", "disk"] = "memory"
    """`disk` builds inverted lists shard by shard into a file that is mapped when searched, for sets beyond memory;
    kinds ivf-flat, ivf-sq8, ivf-pq, ivf-opq."""
    texts: bool = False
    """Index the text tables as well as the image tables."""


class Eval(Section):
    """Metrics, intervals, comparisons and the report."""

    recall_at: Annotated[tuple[Count, ...], Listed, Field(min_length=1)] = (1, 5, 10)
    """The k of recall@k."""
    true_recall: bool = False
    """Also report the share of all correct items among the first k, beside whether any is."""
    extra_positives: Annotated[tuple[str, ...], Listed, Field(max_length=2)] = ()
    """JSON files of all right answers, as ECCV Caption and CxC have them: id of a caption -> ids of the images that it
    describes, then id of an image -> ids of the captions that describe it. Adds recalls, mAP@R and R-precision over the
    captions, and the images, that they name."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples, drawn by image, behind every interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of the intervals."""
    meteor: Literal["auto", "on", "off"] = "auto"
    """METEOR needs Java; `auto` leaves it out where there is none, `on` fails."""
    clip_score: bool = True
    """Also score captions by CLIPScore and RefCLIPScore with `model.clip`, `A photo depicts ` before each caption and
    reference; left out where the test images did not go through that very model."""
    neighbours: Count = 20
    """Votes of k-NN on image features (`embed.train_count`)."""
    probe_strength: Annotated[float, Field(gt=0)] = 1.0
    """Inverse strength of the penalty of the linear probe on image features, scikit-learn's C."""
    beams: Count = 1
    """Beams that captions are generated with; 1 is greedy."""
    caption_tokens: Count = 48
    """Most tokens of a generated caption."""
    questions: Strings = ()
    """Questions that models of task `llava` answer: ScienceQA's folder (`problems.json`, `pid_splits.json`, `images/`),
    or Parquet files of MMMU. They are asked as LLaVA's and MMMU's own evaluations do, and answer greedily; their images
    go through f_r. Adds `scienceqa_accuracy` and `mmmu_accuracy`, also of each group of questions."""
    question_split: str = "test"
    """Split of ScienceQA."""
    answer_tokens: Count = 64
    """Most tokens of an answer."""
    allow_generated_flow: bool = False
    """Also evaluate test images that were embedded through f_g (`embed.flow = "generated"`). `embed.real_encoder =
    "tuned"` allows it for its own test set."""
    shared_captions: Literal["auto", "fail", "report"] = "auto"
    """Captions that training and test set share, word for word: stop, or count them in the report. `auto` stops when
    more than a tenth of the test captions are shared, unless they name classes. Shared images always stop."""
    examples: Limit = 6
    """Rows of images, retrievals and captions that the report shows of each sort."""
    thumbnail: Annotated[int, Field(ge=16, le=512)] = 96
    """Longest side of an image in the report, pixels."""


class Runtime(Section):
    """How to run, never what comes out; left out of every digest."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compute on; `auto` takes a GPU when torch sees one."""
    threads: Limit = 0
    """CPU threads for torch; 0 leaves torch's default. Another number can move the last bits of sums: equal bytes
    after a restart need the same number."""
    workers: Limit = 2
    """Threads that decode and encode images."""
    sharding: Literal["none", "full"] = "none"
    """`llava` under `torchrun`: each process holds the whole language model, or (`full`: FSDP2, ZeRO's third stage) its
    share of the weights, gradients and moments, for models that no single GPU can hold."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Listed] = ()
    """Programs that also receive the loss curves as they grow; each needs its package. `metrics.jsonl` is always
    written."""
    checkpoint_seconds: NonNegative = 30.0
    """Least time between two training checkpoints, seconds."""


class Profile(Section):
    """A whole experiment: what to make, from what, and how."""

    name: str = "custom"
    """Name of the profile; also the name of the run when `--run` is not given."""
    summary: str = ""
    """One line: what it does, what it costs, what it should reach."""
    stages: Annotated[tuple[StageName, ...], Listed] = (
        "generate",
        "align",
        "train",
        "embed",
        "index",
        "eval",
    )
    """Stages `gmail run` runs, in order."""
    seed: int = 0
    """Seed everything random is derived from."""
    data: Data = Data()
    model: Model = Model()
    generate: Generate = Generate()
    align: Align = Align()
    train: Train = Train()
    embed: Embed = Embed()
    index: Index = Index()
    eval: Eval = Eval()
    runtime: Runtime = Runtime()


SECTIONS = tuple(
    name
    for name, field in Profile.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)
