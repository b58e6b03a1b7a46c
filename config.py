"""Every setting of HTS-AT. Edit a value here, or give it as a flag: `python main.py train --max_epoch 5`.

Each setting is one annotated assignment and one comment, which is also the flag's help. Settings further down may
be computed from those above: they follow a flag too (`--dataset_type scv2` moves sample_rate, hop_size, ...). Prepared
data bring classes_num, task and their sample rate (data_rate): what stands here counts where there are none.
A comment line names the section of the settings below it, which says what they belong to (settings.section): a
checkpoint brings data set, split, clips, encoder, front-end, sizes and network; run, machine and the commands are no
part of an experiment. A section like `network, htsat` is that of one encoder. After a change of names or types:
`python settings.py`, which writes config_fields.pyi for type checkers.
After an edit in a notebook, restart or reload: a running session keeps the values that it has imported.
"""

from typing import Annotated, Literal, Optional

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
ThreeInts = Annotated[list[int], Field(min_length=3, max_length=3)]
ThreeFloats = Annotated[list[float], Field(min_length=3, max_length=3)]
Range = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Shifts = Annotated[list[int], Field(min_length=1)]
Decay = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[
    str, Field(pattern=r"^[^/\\\x00-\x1f\x7f]*[^./\\\x00-\x1f\x7f ][^/\\\x00-\x1f\x7f]*$")
]  # of one file or folder
Layers = Annotated[int, Field(ge=1, le=100)]
Side = Annotated[int, Field(ge=1, le=2048)]

# --- data set --------------------------------------------------------------------------------------------------------
dataset_type: Literal[  # which data set
    "demo", "audioset", "audioset-strong", "esc-50", "scv2", "desed", "dcase2016-task2", "folder", "soundscapes"
] = "demo"
task: Literal["multilabel", "single_label"] = (  # several classes a clip (mAP), or exactly one (accuracy)
    "single_label" if dataset_type in ("esc-50", "scv2") else "multilabel"
)

# --- split -----------------------------------------------------------------------------------------------------------
protocol: Literal["held_out", "paper"] = (  # choose the best checkpoint on validation clips, or on the test clips
    "paper" if dataset_type == "audioset" else "held_out"
)
esc_fold: PositiveInt = 1  # ESC-50: the fold held out for testing, numbered as in esc50.csv (1 to 5)

# --- run -------------------------------------------------------------------------------------------------------------
recipe: Optional[Name] = None  # settings of recipes/<name>.py, where nothing else is given
exp_name: Name = (  # name of the run: its folder is <workspace>/runs/<exp_name>
    f"htsat_{dataset_type}_fold{esc_fold}" if dataset_type == "esc-50" else f"htsat_{dataset_type}"
)
workspace: str = "workspace"  # folder of prepared data and runs
dataset_path: str = f"{workspace}/data/{dataset_type}"  # folder of the prepared data (AudioSet: that of hdf5s/)
results_path: str = f"{workspace}/results.jsonl"  # file to which each test adds a line, and which results prints
class_map_path: Optional[str] = None  # AudioSet's ontology.json, which enable_label_enhance needs
resume: Optional[str] = None  # resume an interrupted run: auto, or the path of one of its checkpoints
save_top_k: PositiveInt = (  # checkpoints to keep, best first, beside the last one
    10 if dataset_type == "audioset" else 3
)
checkpoint_every_steps: NonNegativeInt = (  # write last.ckpt in the middle of an epoch as well, 0: only at its end
    1000 if dataset_type == "audioset" else 0
)
watch_test: bool = False  # train: score the test clips after each epoch too, to report and never to choose by
debug: bool = False  # run only a few batches of everything, to see whether it runs

# --- machine ---------------------------------------------------------------------------------------------------------
accelerator: Literal["auto", "cpu", "gpu"] = "auto"  # where to run
devices: NonNegativeInt = 0  # how many devices; 0: every GPU there is, or one CPU process
num_workers: NonNegativeInt = 3 if dataset_type == "audioset" else 0  # processes that read data, for each device
performance: Literal["auto", "manual"] = "auto"  # auto: take what the device is good at where a setting says auto
compile: Literal["auto", "off", "default"] = "auto" if performance == "auto" else "off"  # default: torch.compile
gradient_checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third slower

# --- training --------------------------------------------------------------------------------------------------------
batch_size: PositiveInt = 128 if dataset_type == "audioset" else 32  # clips in one step, all devices together
learning_rate: PositiveFloat = (  # multiplied by the scale of the epoch (lr_rate), or of the step (cosine)
    1e-2 if dataset_type == "demo" else 1e-3
)
max_epoch: PositiveInt = 100 if dataset_type in ("audioset", "esc-50", "scv2") else 30  # epochs to train
lr_scheduler_epoch: ThreeInts = [10, 20, 30]  # last epochs at the scales lr_rate[2], lr_rate[1], lr_rate[0]
lr_rate: ThreeFloats = [0.02, 0.05, 0.1]  # scales of the three warm-up epochs, then downwards again
lr_schedule: Literal["epochs", "cosine", "milestones"] = (  # by lr_rate, or warm-up and then a cosine to 0, or steps
    "epochs"
)
warm_up: NonNegativeFloat = 0.1  # lr_schedule = cosine, milestones: steps of warm-up, or below 1 their share of all
lr_milestones: list[PositiveInt] = []  # lr_schedule = milestones: after so many epochs the rate falls
lr_factor: Decay = 0.5  # lr_schedule = milestones: each time by this factor
adam_beta1: FractionBelowOne = 0.9  # AdamW's share of the old gradient
weight_decay: NonNegativeFloat = 0.05  # AdamW's, on every parameter; with 0 it is Adam
gradient_clip: NonNegativeFloat = 1.0  # largest norm of the gradient, 0 for no limit
precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = (  # arithmetic of the network; the front-end stays float32
    "auto" if performance == "auto" else "32"
)
accumulate_batches: PositiveInt = 1  # parts that batch_size is cut into, one after another, to fit into memory

# --- training clips --------------------------------------------------------------------------------------------------
random_seed: NonNegativeInt = 970131  # seed of everything that is random
index_type: Name = "full_train"  # AudioSet: index to train on, hdf5s/indexes/<index_type>.h5
class_filter: list[str] = []  # training: only clips with one of these classes (numbers or names); empty: all
epoch_clips: NonNegativeInt = 0  # clips drawn in an epoch, 0: as many as there are
random_crops: bool = False  # training on event times: clips cut from one recording begin anywhere in it
balanced_data: bool = dataset_type == "audioset"  # draw the classes equally often
oversample_weak: NonNegativeFloat = 0.0  # AudioSet, balanced_data: draw 77 weak classes oftener (published: 0.4)

# --- starting weights ------------------------------------------------------------------------------------------------
resume_checkpoint: Optional[str] = None  # checkpoint to fine-tune from (train), evaluate (test) or use (predict)
swin_pretrain_path: Optional[str] = None  # train: ImageNet Swin weights (Swin-T/C24, window 8, 256 x 256) to start from
frontend_from: Literal["auto", "settings", "checkpoint"] = "auto"  # whose front-end; auto: the settings' in train only

# --- fine-tuning -----------------------------------------------------------------------------------------------------
linear_probe: bool = False  # fine-tuning: only a linear layer on the averaged tokens, of clips as they are
freeze_backbone: bool = linear_probe  # fine-tuning: train only the classifier
layer_decay: Decay = 1.0  # fine-tuning: each layer learns slower than the one above it, by this factor
decay_matrices_only: bool = False  # no weight_decay for biases, norms and all else of one dimension

# --- encoder ---------------------------------------------------------------------------------------------------------
encoder: Literal[  # the network, by its name in model/registry.py
    "htsat",
    "ast",
    "atst-f",
    "beats",
    "fpasst",
    "m2d",
    "asit",
    "psla",
    "resnet50",
    "mobilenetv2",
    "cnn14",
    "mn10",
    "frame_mn06",
    "frame_mn10",
    "tal",
    "taltrans",
    "transformer",
    "fnet",
    "linear",
] = "htsat"
encoder_options: dict[str, str] = {}  # its sizes, as time_stride=8,depth=6; `python main.py encoders` lists them

# --- front-end -------------------------------------------------------------------------------------------------------
data_rate = (  # of the prepared data, which say it themselves (data/facts.py)
    16000 if dataset_type in ("scv2", "dcase2016-task2") else 32000
)
sample_rate: PositiveInt = (  # samples per second that the network is given
    {"htsat": data_rate, "cnn14": 32000, "mn10": 32000}.get(encoder, 16000)
)

# --- front-end, htsat ------------------------------------------------------------------------------------------------
window_size: PositiveInt = 1024  # STFT window in samples
hop_size: PositiveInt = sample_rate // 100  # STFT hop in samples: 10 ms
mel_bins: PositiveInt = 64  # mel bands
fmin: NonNegativeFloat = 50.0  # lower edge of the lowest mel band in Hz
fmax: PositiveFloat = min(14000.0, sample_rate / 2)  # upper edge of the highest mel band in Hz

# --- clips -----------------------------------------------------------------------------------------------------------
clip_samples: PositiveInt = sample_rate * 10  # samples that the network is given: 10 s
short_clips: Literal["pad", "repeat"] = (  # how a clip shorter than clip_samples is filled up
    "repeat" if dataset_type in ("esc-50", "scv2") else "pad"
)

# --- network ---------------------------------------------------------------------------------------------------------
classes_num: PositiveInt = (  # classes
    {"demo": 10, "esc-50": 50, "scv2": 35, "audioset-strong": 447}.get(dataset_type, 527)
)
loss_type: Literal["clip_bce", "clip_ce", "asl_loss", "frame_bce", "weak_strong_bce"] = (  # frame_...: learn from times
    "clip_ce" if task == "single_label" and dataset_type != "scv2" else "clip_bce"
)
sequence_head: Literal["none", "gru", "lstm", "attention", "transformer"] = (
    "none"  # layers over the steps of the frame scores
)
sequence_layers: Layers = 2  # sequence_head: how many
sequence_dim: PositiveInt = 256  # sequence_head: channels

# --- sizes, htsat ----------------------------------------------------------------------------------------------------
htsat_size: Literal["tiny", "small", "full"] = "full"  # sizes: tiny and small for a laptop, full: the paper's network
htsat_spec_size: Side = 256  # height and width of the folded spectrogram
htsat_patch_size: PositiveInt = 4  # side of a patch
htsat_stride: PositiveInt = 4  # stride of the patches
htsat_time_stride: PositiveInt = htsat_stride  # stride of the patches in time; half of htsat_stride: steps half as long
htsat_window_size: PositiveInt = 8  # side of an attention window in tokens
htsat_dim: PositiveInt = (  # channels of the first stage, doubled by each further one
    {"tiny": 32, "small": 48, "full": 96}[htsat_size]
)
htsat_depth: list[Layers] = [1, 1, 2, 1] if htsat_size == "tiny" else [2, 2, 6, 2]  # blocks of each stage
htsat_num_head: list[PositiveInt] = (  # attention heads of each stage
    [4, 8, 16, 32] if htsat_size == "full" else [2, 4, 8, 16]
)

# --- network, htsat --------------------------------------------------------------------------------------------------
enable_tscam: bool = not linear_probe  # token-semantic convolution; without it a linear layer on the averaged tokens
enable_repeat_mode: bool = False  # a quarter of the spectrogram four times, instead of the fold in time
htsat_attn_heatmap: bool = False  # weight the frame scores with the last stage's attention
htsat_readout_stage: PositiveInt = len(htsat_depth)  # stage whose steps the frame scores have: the last, or a finer one
htsat_drop_path: FractionBelowOne = 0.1  # stochastic depth of the last block, rising linearly from 0 at the first

# --- averaged weights ------------------------------------------------------------------------------------------------
weight_averaging: Literal["none", "ema", "last_epochs"] = "none"  # average the weights while training
ema_decay: FractionBelowOne = 0.999  # weight_averaging = ema: share of the old average that a step keeps
average_last_epochs: PositiveInt = 5  # weight_averaging = last_epochs: how many

# --- augmentation ----------------------------------------------------------------------------------------------------
mixup_alpha: NonNegativeFloat = (  # mixup of features with weights from Beta(a, a), 0: none
    0.0 if dataset_type == "demo" or linear_probe else 0.5
)
mixup_targets: bool = loss_type in ("frame_bce", "weak_strong_bce")  # mix the targets too (the paper leaves them)
spec_augment: bool = not linear_probe  # SpecAugment: masks over frames and over bands
spec_masks: PositiveInt = 2  # spec_augment: how many of each
spec_mask_frames: PositiveInt = 64  # spec_augment: frames that a mask stays below
spec_mask_bands: PositiveInt = 8  # spec_augment: mel bands that a mask stays below
feature_noise: NonNegativeFloat = 0.0  # training: add uniform noise to the features, of a random strength up to this
enable_label_enhance: bool = False  # training: in half of the clips, add all ancestors and a random child of each class
enable_token_label: bool = False  # training: replace a stretch of each clip by another clip's, with targets by frame
token_label_range: Range = [0.2, 0.6]  # shortest and longest such stretch, as a share of the clip
enable_time_shift: bool = False  # training: roll the waveform by a random number of samples
shift_max: PositiveInt = clip_samples // 2  # largest such shift in samples
crop_size: Optional[PositiveInt] = None  # training: a random stretch of so many samples; None: the whole clip

# --- frame augmentation ----------------------------------------------------------------------------------------------
mixup_waveforms: bool = False  # mix the sounds themselves, in place of their features
gain_range: NonNegativeFloat = 0.0  # louder or softer by up to so many dB
mixup_probability: Fraction = 1.0  # share of the batches that mixup is applied to
wavmix: Fraction = 0.0  # probability of mixing a clip's sound and targets with those of another, beside mixup
wavmix_alpha: PositiveFloat = 2.0  # wavmix: weights from Beta(a, a), of which the clip itself has the larger part
frame_shift: FractionBelowOne = 0.0  # roll the features in time: standard deviation, as a share of the clip
frequency_warp: FractionBelowOne = 0.0  # stretch the mel axis by up to this share
warp_probability: Fraction = 1.0  # share of the batches that frequency_warp is applied to
filter_augment: NonNegativeFloat = 0.0  # filter by random curves of up to so many dB
filter_probability: Fraction = 1.0  # share of the batches that filter_augment is applied to
mix_style: Fraction = 0.0  # probability of mixing the frequency statistics of two clips (MixStyle)
mix_style_alpha: PositiveFloat = 0.1  # mix_style: weights from Beta(a, a)
time_mask: Fraction = 0.0  # silence one stretch in all clips of a batch, of up to this share of the clip
augment_by: Literal["clips", "batches"] = "clips"  # mixup, warp, filter, styles: own form, or that of PretrainedSED

# --- frame training --------------------------------------------------------------------------------------------------
weak_weight: NonNegativeFloat = 0.5  # weak_strong_bce: weight of the clips' loss, beside 1 for the frames'
fractional_targets: bool = True  # frame targets: the share of a step that events cover; no: 1 from a half on
touched_targets: bool = False  # frame targets: 1 for each step that an event touches, whatever fractional_targets
balanced_by: Literal["clips", "frames", "active_frames"] = (  # balanced_data by class, seconds, or as PretrainedSED
    "clips"
)
balanced_replacement: bool = True  # balanced_by frames, active_frames: an epoch may draw a clip several times
distillation_weight: Fraction = 0.9  # share of the teacher's loss, the labels have the rest
mean_teacher_decay: FractionBelowOne = 0.999  # mean_teacher: share of the old average that a step keeps
mean_teacher_rampup: PositiveInt = 10  # mean_teacher: epochs in which its weight rises

# --- semi-supervised -------------------------------------------------------------------------------------------------
labelling_shares: list[Fraction] = []  # share of strong, weak and unlabelled clips in each batch; empty: as they come
teacher_path: Optional[str] = None  # file of a teacher's frame logits, as teach writes it, to learn from as well
mean_teacher: NonNegativeFloat = 0.0  # largest weight of the consistency with the averaged weights; 0: none

# --- test ------------------------------------------------------------------------------------------------------------
test_split: Literal["test", "validation", "train"] = "test"  # test: the clips to score; thresholds: validation
tta_shifts: Shifts = (  # test: average the scores over circular shifts by so many samples
    [0, 100, 300, 600, 1000, 1500, 2100, 2800, 3600, 4500] if dataset_type == "audioset" else [0]
)
test_file: Name = test_split  # name of the score file, without its ending .h5
test_shard: list[int] = []  # test: 2,4 scores the second of four shares of the clips; fl_evaluate joins all; empty: all
heatmap_dir: str = f"{workspace}/runs/{exp_name}/scores"  # folder of the score files that test writes
fl_local: bool = False  # test: also write frame scores, for localization

# --- localization ----------------------------------------------------------------------------------------------------
fl_dataset: Optional[str] = None  # test with fl_local: the clip store (.h5) to localize in, else that of dataset_path
fl_audioset_mapping: str = "reviewed"  # AudioSet's classes -> those of the data: published, reviewed, or a JSON file
fl_class_num: list[str] = []  # fl_evaluate, evaluate: the classes, by name; empty: all
fl_clips: Optional[Literal["all", "with_events", "recordings"]] = (
    None  # fl_evaluate, evaluate: all clips, those with events, or whole recordings; None: what suits the data set
)

# --- event detection -------------------------------------------------------------------------------------------------
fl_postprocessing: Optional[Literal["published_sed", "dcase2016", "dcase2016_published"]] = (
    None  # way from scores to events that a publication has, in place of the calibrated one; None: calibrated
)
fl_threshold: list[float] = []  # frame score above which a class is on, one or one a class; empty: calibrated, or 0.5
fl_median_filter: list[int] = []  # median filter, odd numbers of steps, one or one a class; empty: calibrated, or none
fl_minimum_duration: list[float] = []  # seconds of the shortest event, one or one a class; empty: calibrated, or 0
fl_maximum_gap: list[float] = []  # seconds between events that are joined, one or one a class; empty: calibrated, or 0
fl_interpolation: Optional[int] = None  # parts of a step, scores on straight lines; None: calibrated, or 1 for none

# --- predict ---------------------------------------------------------------------------------------------------------
window_overlap: FractionBelowOne = (  # predict: share of a window (clip_samples) that the next one covers again
    0.0 if fl_postprocessing == "published_sed" else 0.5
)
last_window: Literal["aligned", "filled"] = (  # predict: the last window ends with the recording, or is filled up
    "filled" if fl_postprocessing == "published_sed" else "aligned"
)
clip_pooling: Literal["mean", "max"] = (  # predict: how the windows of a long recording make its clip scores
    "mean" if task == "single_label" else "max"
)

# --- esm_test --------------------------------------------------------------------------------------------------------
esm_model_pathes: list[str] = []  # esm_test: checkpoints whose scores are averaged; a run's folder: all that it keeps
esm_together: Optional[bool] = None  # esm_test: all members in memory at once; None: where they take at most half of it

# --- weight_average --------------------------------------------------------------------------------------------------
wa_folder: Optional[str] = None  # weight_average: what to average: a run, a folder, a file or a glob; None: this run
wa_top_k: NonNegativeInt = 0  # weight_average: only so many of a run's checkpoints, those with the best metric; 0: all
wa_epochs: list[PositiveInt] = []  # weight_average: first and last epoch of a run, as 6,25; empty: all
wa_reestimate_bn: bool = False  # weight_average: measure the statistics of BatchNorm anew on training clips
wa_test: bool = False  # weight_average: test the average at once
wa_model_path: str = f"{workspace}/runs/{exp_name}/weight_average.ckpt"  # weight_average: the file it writes
