"""python main.py encoders: the encoders that --encoder names, and their options."""

from typing import Any

from model.registry import ENCODERS

COLUMNS = ("`--encoder`", "paper", "parameters", "clips/s", "sample rate", "frame", "licence", "published weights")


def run(given: dict[str, Any]) -> None:
    """Print the table of the README, and below it the options of each encoder with their defaults."""
    print(encoder_table())
    for name, encoder in ENCODERS.items():
        for option, about in encoder.options.items():
            choices = f" ({', '.join(about.choices)})" if about.choices else ""
            print(f"{name}: --encoder_options {option}={about.default}  {about.help}{choices}")


def encoder_table() -> str:
    """Markdown, one row an encoder; parameters with 527 classes, clips of 10 s a second on one core of a CPU."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, encoder in ENCODERS.items():
        rows.append(
            (
                f"`{name}`",
                f"{encoder.title}: {encoder.paper}",
                f"{encoder.parameters / 1e6:.1f} M",
                "" if encoder.clips_per_second is None else f"{encoder.clips_per_second:.2g}",
                f"{encoder.sample_rate / 1000:g} kHz",
                "none" if encoder.frame_seconds is None else f"{encoder.frame_seconds * 1000:g} ms",
                encoder.licence,
                f"[{', '.join(f'`{known}`' for known in encoder.published) or 'code'}]({encoder.address})",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
