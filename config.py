"""Every setting of HTS-AT. Edit a value here, or give it as a flag: `python main.py train --max_epoch 5`.

Each setting is one annotated assignment and one comment, which is also the flag's help. Settings further down may
be computed from those above: they follow a flag too (`--dataset_type scv2` moves sample_rate, hop_size, ...).
After an edit in a notebook, restart or reload: a running session keeps the values that it has imported.
"""

from typing import Literal, Optional

# --- what and where -------------------------------------------------------------------------------------------------
dataset_type: Literal[  # which data set
    "demo", "audioset", "audioset-strong", "esc-50", "scv2", "desed", "folder", "soundscapes"
] = "demo"
task: Literal["multilabel", "single_label"] = (  # several classes a clip (mAP), or exactly one (accuracy)
    "single_label" if dataset_type in ("esc-50", "scv2") else "multilabel"
)
esc_fold: int = 1  # ESC-50: the fold held out for testing, numbered as in esc50.csv (1 to 5)
exp_name: str = (  # name of the run: its folder is <workspace>/runs/<exp_name>
    f"htsat_{dataset_type}_fold{esc_fold}" if dataset_type == "esc-50" else f"htsat_{dataset_type}"
)
workspace: str = "workspace"  # folder of prepared data and runs
dataset_path: str = f"{workspace}/data/{dataset_type}"  # folder of the prepared data (AudioSet: that of hdf5s/)
index_type: str = "full_train"  # AudioSet: index to train on, hdf5s/indexes/<index_type>.h5
protocol: Literal["held_out", "paper"] = (  # choose the best checkpoint on validation clips, or on the test clips
    "paper" if dataset_type == "audioset" else "held_out"
)
debug: bool = False  # run only a few batches of everything, to see whether it runs

# --- training -------------------------------------------------------------------------------------------------------
resume: Optional[str] = None  # go on with an interrupted run: auto, or the path of one of its checkpoints
resume_checkpoint: Optional[str] = None  # checkpoint to fine-tune from (train), evaluate (test) or use (predict)
swin_pretrain_path: Optional[str] = None  # train: ImageNet Swin weights (Swin-T/C24, window 8, 256 x 256) to start from
random_seed: int = 970131  # seed of everything that is random
batch_size: int = 128 if dataset_type == "audioset" else 32  # clips in one step, all devices together
learning_rate: float = 1e-2 if dataset_type == "demo" else 1e-3  # multiplied by the scale of the epoch (lr_rate)
max_epoch: int = 100 if dataset_type in ("audioset", "esc-50", "scv2") else 30  # epochs to train
lr_scheduler_epoch: list[int] = [10, 20, 30]  # last epochs at the scales lr_rate[2], lr_rate[1], lr_rate[0]
lr_rate: list[float] = [0.02, 0.05, 0.1]  # scales of the three warm-up epochs, then downwards again
weight_decay: float = 0.05  # AdamW's, on every parameter
layer_decay: float = 1.0  # fine-tuning: each layer learns slower than the one above it, by this factor
linear_probe: bool = False  # fine-tuning: only a linear layer on the averaged tokens, of clips as they are
freeze_backbone: bool = linear_probe  # fine-tuning: train only the classifier
gradient_clip: float = 1.0  # largest norm of the gradient, 0 for no limit
loss_type: Literal["clip_bce", "clip_ce", "asl_loss", "frame_bce", "weak_strong_bce"] = (  # frame_...: learn from times
    "clip_ce" if task == "single_label" and dataset_type != "scv2" else "clip_bce"
)
balanced_data: bool = dataset_type == "audioset"  # draw the classes equally often
mixup_alpha: float = (  # mixup of features with weights from Beta(a, a), 0: none
    0.0 if dataset_type == "demo" or linear_probe else 0.5
)
mixup_targets: bool = loss_type in ("frame_bce", "weak_strong_bce")  # mix the targets too (the paper leaves them)
mixup_waveforms: bool = False  # mix the sounds themselves, in place of their features
spec_augment: bool = not linear_probe  # SpecAugment: 2 time masks of up to 64 frames, 2 band masks of up to 8
weight_averaging: Literal["none", "ema", "last_epochs"] = "none"  # average the weights while training
ema_decay: float = 0.999  # weight_averaging = ema: share of the old average that a step keeps
average_last_epochs: int = 5  # weight_averaging = last_epochs: how many
checkpoint_every_steps: int = (  # write last.ckpt in the middle of an epoch as well, 0: only at its end
    1000 if dataset_type == "audioset" else 0
)
save_top_k: int = 10 if dataset_type == "audioset" else 3  # checkpoints to keep, best first, beside the last one

# --- training from event times and teachers ---------------------------------------------------------------------------
weak_weight: float = 0.5  # weak_strong_bce: weight of the clips' loss, beside 1 for the frames'
fractional_targets: bool = True  # frame targets: the share of a step that events cover; no: 1 from a half on
balanced_by: Literal["clips", "frames"] = "clips"  # balanced_data: classes equally often, or by seconds of their events
labelling_shares: list[float] = []  # share of strong, weak and unlabelled clips in each batch; empty: as they come
gain_range: float = 0.0  # louder or softer by up to so many dB
frequency_warp: float = 0.0  # stretch the mel axis by up to this share
filter_augment: float = 0.0  # filter by random curves of up to so many dB
mix_style: float = 0.0  # probability of mixing the frequency statistics of two clips (MixStyle)
teacher_path: Optional[str] = None  # file of a teacher's frame logits, as teach writes it, to learn from as well
distillation_weight: float = 0.9  # share of the teacher's loss, the labels have the rest
mean_teacher: float = 0.0  # largest weight of the consistency with the moving average of the weights; 0: none
mean_teacher_decay: float = 0.999  # mean_teacher: share of the old average that a step keeps
mean_teacher_rampup: int = 10  # mean_teacher: epochs in which its weight rises

# --- machine --------------------------------------------------------------------------------------------------------
accelerator: Literal["auto", "cpu", "gpu"] = "auto"  # where to run
devices: int = 0  # how many devices; 0: every GPU there is, or one CPU process
num_workers: int = 3 if dataset_type == "audioset" else 0  # processes that read data, for each device
performance: Literal["auto", "manual"] = "auto"  # auto: take what the device is good at where a setting says auto
precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = (  # arithmetic of the network; the front-end stays float32
    "auto" if performance == "auto" else "32"
)
compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = (  # torch.compile, by its modes
    "auto" if performance == "auto" else "off"
)
accumulate_batches: int = 1  # training: parts that batch_size is cut into, one after another, to fit into memory
gradient_checkpointing: bool = False  # recompute each Swin block in the backward pass: less memory, a third slower

# --- audio ----------------------------------------------------------------------------------------------------------
sample_rate: int = 16000 if dataset_type == "scv2" else 32000  # samples per second
clip_samples: int = sample_rate * 10  # samples that the network is given: 10 s
short_clips: Literal["pad", "repeat"] = (  # how a clip shorter than clip_samples is filled up
    "repeat" if dataset_type in ("esc-50", "scv2") else "pad"
)
window_size: int = 1024  # STFT window in samples
hop_size: int = sample_rate // 100  # STFT hop in samples: 10 ms
mel_bins: int = 64  # mel bands
fmin: float = 50.0  # lower edge of the lowest mel band in Hz
fmax: float = min(14000.0, sample_rate / 2)  # upper edge of the highest mel band in Hz
frontend_from: Literal["auto", "settings", "checkpoint"] = "auto"  # whose front-end; auto: the settings' in train only
class_filter: list[str] = []  # training: only clips with one of these classes (numbers or names); empty: all
enable_label_enhance: bool = False  # training: in half of the clips, add all ancestors and a random child of each class
class_map_path: Optional[str] = None  # AudioSet's ontology.json, which enable_label_enhance needs
enable_token_label: bool = False  # training: replace a stretch of each clip by another clip's, with targets by frame
token_label_range: list[float] = [0.2, 0.6]  # shortest and longest such stretch, as a share of the clip
enable_time_shift: bool = False  # training: roll the waveform by a random number of samples
shift_max: int = clip_samples // 2  # largest such shift in samples
crop_size: Optional[int] = None  # training: a random stretch of so many samples; None: the whole clip

# --- network --------------------------------------------------------------------------------------------------------
classes_num: int = {"demo": 10, "esc-50": 50, "scv2": 35, "audioset-strong": 447}.get(dataset_type, 527)  # classes
enable_tscam: bool = not linear_probe  # token-semantic convolution; without it a linear layer on the averaged tokens
enable_repeat_mode: bool = False  # a quarter of the spectrogram four times, instead of the fold in time
htsat_attn_heatmap: bool = False  # weight the frame scores with the last stage's attention
htsat_spec_size: int = 256  # height and width of the folded spectrogram
htsat_patch_size: int = 4  # side of a patch
htsat_stride: int = 4  # stride of the patches
htsat_time_stride: int = htsat_stride  # stride of the patches in time; half of htsat_stride: steps half as long
htsat_window_size: int = 8  # side of an attention window in tokens
htsat_dim: int = 96  # channels of the first stage, doubled by each further one
htsat_depth: list[int] = [2, 2, 6, 2]  # blocks of each stage
htsat_num_head: list[int] = [4, 8, 16, 32]  # attention heads of each stage
htsat_readout_stage: int = len(htsat_depth)  # stage whose steps the frame scores have: the last, or a finer one before
htsat_drop_path: float = 0.1  # stochastic depth of the last block, rising linearly from 0 at the first
sequence_head: Literal["none", "gru", "attention", "transformer"] = "none"  # layers over the steps of the frame scores
sequence_layers: int = 2  # sequence_head: how many
sequence_dim: int = 256  # sequence_head: channels

# --- evaluation -----------------------------------------------------------------------------------------------------
tta_shifts: list[int] = (  # test: average the scores over circular shifts by so many samples
    [0, 100, 300, 600, 1000, 1500, 2100, 2800, 3600, 4500] if dataset_type == "audioset" else [0]
)
test_split: Literal["test", "validation", "train"] = "test"  # test: the clips to score; thresholds: validation
watch_test: bool = False  # train: score the test clips after each epoch too, to report and never to choose by
fl_local: bool = False  # test: also write frame scores, for localization
heatmap_dir: str = f"{workspace}/runs/{exp_name}/scores"  # folder of the score files that test writes
test_file: str = "test"  # name of the score file, without its ending .h5
test_shard: list[int] = []  # test: 2,4 scores the second of four shares of the clips; fl_evaluate joins all; empty: all
results_path: str = f"{workspace}/results.jsonl"  # file to which each test adds a line, and which results prints
fl_dataset: Optional[str] = None  # test with fl_local: the clip store (.h5) to localize in, else that of dataset_path
fl_audioset_mapping: str = "reviewed"  # AudioSet's classes -> those of the data: published, reviewed, or a JSON file
fl_class_num: list[str] = []  # fl_evaluate, evaluate: the classes, by name; empty: all
fl_threshold: list[float] = []  # frame score above which a class is on, one or one a class; empty: calibrated, or 0.5
fl_median_filter: list[int] = []  # median filter, odd numbers of steps, one or one a class; empty: calibrated, or none
fl_minimum_duration: list[float] = []  # seconds of the shortest event, one or one a class; empty: calibrated, or 0
fl_maximum_gap: list[float] = []  # seconds between events that are joined, one or one a class; empty: calibrated, or 0
fl_interpolation: Optional[int] = None  # parts of a step, scores on straight lines; None: calibrated, or 1 for none
window_overlap: float = 0.5  # predict: share of a window (clip_samples) that the next one covers again
clip_pooling: Literal["mean", "max"] = (  # predict: how the windows of a long recording make its clip scores
    "mean" if task == "single_label" else "max"
)
esm_model_pathes: list[str] = []  # esm_test: checkpoints whose scores are averaged
esm_together: Optional[bool] = None  # esm_test: all members in memory at once; None: where they take at most half of it
wa_folder: Optional[str] = None  # weight_average: checkpoints to average: a run, a folder or a glob; None: this run's
wa_top_k: int = 0  # weight_average: only so many of a run's checkpoints, those with the best metric; 0: all
wa_reestimate_bn: bool = False  # weight_average: measure bn0's mean and variance anew on the training clips
wa_test: bool = False  # weight_average: test the average at once
wa_model_path: str = f"{workspace}/runs/{exp_name}/weight_average.ckpt"  # weight_average: the file it writes
