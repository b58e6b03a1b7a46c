# Written by `python settings.py`, from config.py.
from pydantic import BaseModel
from typing import Annotated, Literal, Optional
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
ThreeInts = Annotated[list[int], Field(min_length=3, max_length=3)]
ThreeFloats = Annotated[list[float], Field(min_length=3, max_length=3)]
Range = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Shifts = Annotated[list[int], Field(min_length=1)]
Decay = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern='^[^/\\\\\\x00-\\x1f\\x7f]*[^./\\\\\\x00-\\x1f\\x7f ][^/\\\\\\x00-\\x1f\\x7f]*$')]
Layers = Annotated[int, Field(ge=1, le=100)]
Side = Annotated[int, Field(ge=1, le=2048)]
class ConfigFields(BaseModel):
    dataset_type: Literal['demo', 'audioset', 'audioset-strong', 'esc-50', 'scv2', 'desed', 'dcase2016-task2', 'folder', 'soundscapes']
    task: Literal['multilabel', 'single_label']
    protocol: Literal['held_out', 'paper']
    esc_fold: PositiveInt
    recipe: Optional[Name]
    exp_name: Name
    workspace: str
    dataset_path: str
    results_path: str
    class_map_path: Optional[str]
    resume: Optional[str]
    save_top_k: PositiveInt
    checkpoint_every_steps: NonNegativeInt
    watch_test: bool
    debug: bool
    accelerator: Literal['auto', 'cpu', 'gpu']
    devices: NonNegativeInt
    num_workers: NonNegativeInt
    performance: Literal['auto', 'manual']
    compile: Literal['auto', 'off', 'default']
    gradient_checkpointing: bool
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    max_epoch: PositiveInt
    lr_scheduler_epoch: ThreeInts
    lr_rate: ThreeFloats
    lr_schedule: Literal['epochs', 'cosine', 'milestones']
    warm_up: NonNegativeFloat
    lr_milestones: list[PositiveInt]
    lr_factor: Decay
    adam_beta1: FractionBelowOne
    weight_decay: NonNegativeFloat
    gradient_clip: NonNegativeFloat
    precision: Literal['auto', '32', 'bf16-mixed', '16-mixed']
    accumulate_batches: PositiveInt
    random_seed: NonNegativeInt
    index_type: Name
    class_filter: list[str]
    epoch_clips: NonNegativeInt
    random_crops: bool
    balanced_data: bool
    oversample_weak: NonNegativeFloat
    resume_checkpoint: Optional[str]
    swin_pretrain_path: Optional[str]
    frontend_from: Literal['auto', 'settings', 'checkpoint']
    linear_probe: bool
    freeze_backbone: bool
    layer_decay: Decay
    decay_matrices_only: bool
    encoder: Literal['htsat', 'ast', 'atst-f', 'beats', 'fpasst', 'm2d', 'asit', 'psla', 'resnet50', 'mobilenetv2', 'cnn14', 'mn10', 'frame_mn06', 'frame_mn10', 'tal', 'taltrans', 'transformer', 'fnet', 'linear']
    encoder_options: dict[str, str]
    sample_rate: PositiveInt
    window_size: PositiveInt
    hop_size: PositiveInt
    mel_bins: PositiveInt
    fmin: NonNegativeFloat
    fmax: PositiveFloat
    clip_samples: PositiveInt
    short_clips: Literal['pad', 'repeat']
    classes_num: PositiveInt
    loss_type: Literal['clip_bce', 'clip_ce', 'asl_loss', 'frame_bce', 'weak_strong_bce']
    sequence_head: Literal['none', 'gru', 'lstm', 'attention', 'transformer']
    sequence_layers: Layers
    sequence_dim: PositiveInt
    htsat_size: Literal['tiny', 'small', 'full']
    htsat_spec_size: Side
    htsat_patch_size: PositiveInt
    htsat_stride: PositiveInt
    htsat_time_stride: PositiveInt
    htsat_window_size: PositiveInt
    htsat_dim: PositiveInt
    htsat_depth: list[Layers]
    htsat_num_head: list[PositiveInt]
    enable_tscam: bool
    enable_repeat_mode: bool
    htsat_attn_heatmap: bool
    htsat_readout_stage: PositiveInt
    htsat_drop_path: FractionBelowOne
    weight_averaging: Literal['none', 'ema', 'last_epochs']
    ema_decay: FractionBelowOne
    average_last_epochs: PositiveInt
    mixup_alpha: NonNegativeFloat
    mixup_targets: bool
    spec_augment: bool
    spec_masks: PositiveInt
    spec_mask_frames: PositiveInt
    spec_mask_bands: PositiveInt
    feature_noise: NonNegativeFloat
    enable_label_enhance: bool
    enable_token_label: bool
    token_label_range: Range
    enable_time_shift: bool
    shift_max: PositiveInt
    crop_size: Optional[PositiveInt]
    mixup_waveforms: bool
    gain_range: NonNegativeFloat
    mixup_probability: Fraction
    wavmix: Fraction
    wavmix_alpha: PositiveFloat
    frame_shift: FractionBelowOne
    frequency_warp: FractionBelowOne
    warp_probability: Fraction
    filter_augment: NonNegativeFloat
    filter_probability: Fraction
    mix_style: Fraction
    mix_style_alpha: PositiveFloat
    time_mask: Fraction
    augment_by: Literal['clips', 'batches']
    weak_weight: NonNegativeFloat
    fractional_targets: bool
    touched_targets: bool
    balanced_by: Literal['clips', 'frames', 'active_frames']
    balanced_replacement: bool
    distillation_weight: Fraction
    mean_teacher_decay: FractionBelowOne
    mean_teacher_rampup: PositiveInt
    labelling_shares: list[Fraction]
    teacher_path: Optional[str]
    mean_teacher: NonNegativeFloat
    test_split: Literal['test', 'validation', 'train']
    tta_shifts: Shifts
    test_file: Name
    test_shard: list[int]
    heatmap_dir: str
    fl_local: bool
    fl_dataset: Optional[str]
    fl_audioset_mapping: str
    fl_class_num: list[str]
    fl_clips: Optional[Literal['all', 'with_events', 'recordings']]
    fl_postprocessing: Optional[Literal['published_sed', 'dcase2016', 'dcase2016_published']]
    fl_threshold: list[float]
    fl_median_filter: list[int]
    fl_minimum_duration: list[float]
    fl_maximum_gap: list[float]
    fl_interpolation: Optional[int]
    window_overlap: FractionBelowOne
    last_window: Literal['aligned', 'filled']
    clip_pooling: Literal['mean', 'max']
    esm_model_pathes: list[str]
    esm_together: Optional[bool]
    wa_folder: Optional[str]
    wa_top_k: NonNegativeInt
    wa_epochs: list[PositiveInt]
    wa_reestimate_bn: bool
    wa_test: bool
    wa_model_path: str
