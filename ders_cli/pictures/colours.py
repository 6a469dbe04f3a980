"""Colours that hold on light and dark paper, and for most colour-blind readers.

CODECS: Paul Tol's bright and muted qualitative schemes (SRON/EPS/TN/09-002, 2021), mid lightness only.
"""

import colorsys

CODECS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#ee8866",
    "#44bb99",
    "#999999",
    "#7c6bd6",
)
PROJECTION = {"gate": "#5588c0", "up": "#ee8866", "down": "#44a377", "router": "#c9629a"}
SCALE = "Cividis"  # continuous; plotly and matplotlib both have it


def codec_colours(count: int) -> list[str]:
    """One colour for each of `count` codecs."""
    if count <= len(CODECS):
        return list(CODECS[:count])
    return [_hue(i / count, 0.42 + 0.2 * (i % 2)) for i in range(count)]


def _hue(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.6))


def translucent(colour: str, share: float) -> str:
    """ "#4477aa", 0.2 -> "rgba(68,119,170,0.2)"."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"
