"""The network and what belongs to it. build_model is the one place where settings become a network."""

from typing import Any

from model.encoders.htsat import HTSAT_Swin_Transformer


def build_model(settings: Any) -> HTSAT_Swin_Transformer:
    """The network that `settings` (a Config of settings.resolve) describe. Raises UserError for sizes that clash."""
    return HTSAT_Swin_Transformer(
        num_classes=settings.classes_num,
        sample_rate=settings.sample_rate,
        window_size=settings.window_size,
        hop_size=settings.hop_size,
        mel_bins=settings.mel_bins,
        fmin=settings.fmin,
        fmax=settings.fmax,
        spec_size=settings.htsat_spec_size,
        patch_size=settings.htsat_patch_size,
        patch_stride=settings.htsat_stride,
        time_stride=settings.htsat_time_stride,
        embed_dim=settings.htsat_dim,
        depths=settings.htsat_depth,
        num_heads=settings.htsat_num_head,
        attention_window=settings.htsat_window_size,
        drop_path=settings.htsat_drop_path,
        loss_type=settings.loss_type,
        enable_tscam=settings.enable_tscam,
        attn_heatmap=settings.htsat_attn_heatmap,
        readout_stage=settings.htsat_readout_stage,
        sequence_head=settings.sequence_head,
        sequence_layers=settings.sequence_layers,
        sequence_dim=settings.sequence_dim,
        repeat_mode=settings.enable_repeat_mode,
        spec_augment=settings.spec_augment,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
