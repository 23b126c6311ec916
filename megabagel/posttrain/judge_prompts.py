"""Prompts of the model's own judge, in our words, with the structure and the five bands of SRUM's tables 7 and 8."""

from collections.abc import Sequence

from megabagel.rewards.regions import Box

REGION_BANDS = """\
* 1.0: exactly what the prompt asks for, and without any flaw.
* 0.5 to 0.9: clearly part of the prompt, with small flaws; or a well made secondary part.
* -0.4 to 0.4: neutral: partly relevant, mixed quality, or harmless background. 0.0 is exactly neutral.
* -0.9 to -0.5: bad: a distraction, or a relevant object with heavy artifacts.
* -1.0: contradicts what the prompt asks for."""

LAYOUT_BANDS = """\
* 1.0: the arrangement is exactly what the prompt asks for.
* 0.5 to 0.9: good, with small flaws in position, size or spacing.
* -0.4 to 0.4: neutral; always for a prompt that wishes no arrangement and gets a plausible one.
* -0.9 to -0.5: bad: parts are misplaced, missing or of wrong number or size.
* -1.0: contradicts the arrangement that the prompt asks for."""


def region_prompt(prompt: str, boxes: Sequence[Box]) -> str:
    """Question about all regions at once: name each, then score relevance and quality together (local reward)."""
    listed = "\n".join(f"Region ID: {n}\nBounding Box: {list(box)}" for n, box in enumerate(boxes, 1))
    return f"""\
You judge parts of a picture that was made for a prompt.
Prompt: "{prompt}"

Regions, as [left, top, right, bottom] in pixels:
{listed}

For every region: first name the main object inside its box. Then give one score from -1.0 to 1.0 for relevance to the
prompt and visual quality together, as strictly as possible:
{REGION_BANDS}

Answer for every region in this form, regions separated by ---:
Region ID: 1
Identified Object: a short description
Score: one number from -1.0 to 1.0
Reason: one sentence"""


def layout_prompt(prompt: str) -> str:
    """Question about the arrangement alone (global reward)."""
    return f"""\
You judge how a picture that was made for a prompt is arranged: positions, numbers and sizes of its parts, nothing else.
Prompt: "{prompt}"

Score from -1.0 to 1.0:
{LAYOUT_BANDS}

Answer in this form:
Score: one number from -1.0 to 1.0
Reason: one sentence"""


def overall_prompt(prompt: str) -> str:
    """Question about the whole picture, for the ablation `reward.level=picture`."""
    return f"""\
You judge a picture that was made for a prompt: relevance and visual quality together, as strictly as possible.
Prompt: "{prompt}"

Score from -1.0 to 1.0:
{REGION_BANDS}

Answer in this form:
Overall Impression: a short description
Score: one number from -1.0 to 1.0
Reason: one sentence"""
