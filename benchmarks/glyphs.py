"""A synthetic data set at the scale of CIFAR: distorted characters of real fonts on textured backgrounds.

    python -m benchmarks.glyphs --output outputs/glyphs        # fetches Debian's fonts; about two minutes
    python -m benchmarks.glyphs --output outputs/glyphs --font_dir /usr/share/fonts

50,000 training and 10,000 test images, RGB, 32x32, 34 classes (A to Z, 2 to 9; 0 and 1 look like O and I), written as
a directory of parquet files for ``datasets.load_dataset``. Training and test fonts are of different families. The same
seed and fonts give the same images. The card lists the fonts.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

CLASSES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"
SIDE = 32
TEMPLATE = 64  # side of a character before it is distorted
TEST_SHARE = 1 / 5  # of the families
PACKAGES = """
    fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius fonts-adf-irianis
    fonts-adf-libris fonts-adf-mekanus fonts-adf-oldania fonts-adf-romande fonts-adf-switzera fonts-adf-tribun
    fonts-adf-universalis fonts-adf-verana fonts-aenigma fonts-anonymous-pro fonts-averia-sans-gwf
    fonts-averia-serif-gwf fonts-b612 fonts-bebas-neue fonts-cabin fonts-cantarell fonts-cmu fonts-comfortaa
    fonts-comic-neue fonts-courier-prime fonts-crosextra-caladea fonts-crosextra-carlito fonts-dejavu-core
    fonts-dejavu-extra fonts-dosis fonts-dustin fonts-ebgaramond fonts-ecolier-court fonts-fantasque-sans
    fonts-firacode fonts-freefont-ttf fonts-georgewilliams fonts-hack-ttf fonts-humor-sans fonts-inconsolata
    fonts-inter fonts-isabella fonts-jetbrains-mono fonts-junction fonts-jura fonts-karla fonts-lato fonts-liberation
    fonts-linuxlibertine fonts-lobster fonts-manrope fonts-monofur fonts-mononoki fonts-ocr-a fonts-oldstandard
    fonts-open-sans fonts-opendyslexic fonts-play fonts-quicksand fonts-roboto-slab fonts-roboto-unhinted
    fonts-sil-andika fonts-tomsontalks fonts-urw-base35 fonts-vollkorn fonts-yanone-kaffeesatz
""".split()  # noqa: SIM905


def fetch_packages(directory: Path) -> None:
    """Debian's font packages, unpacked below a directory without installation."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "--quiet", "download", *PACKAGES], cwd=directory, check=True)
    for package in sorted(directory.glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", str(package), str(directory)], check=True)
        package.unlink()


@dataclass
class Typeface:
    """One font file: its family, and a mask uint8 (classes, TEMPLATE, TEMPLATE) of its characters."""

    family: str
    digest: str
    masks: np.ndarray


def read_fonts(directory: Path) -> list[Typeface]:
    """Every font of a directory that draws all classes legibly, in an order that does not depend on paths.

    A font is legible if most of its characters are nearer to the mean of their class over all fonts than to the mean of
    any other class. Symbols, ornaments and fonts without the characters are not legible.
    """
    found = {}
    for path in sorted(path for ending in ("ttf", "otf") for path in directory.rglob(f"*.{ending}")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if digest not in found and (masks := draw(path)) is not None:
            found[digest] = Typeface(ImageFont.truetype(path).getname()[0] or path.stem, digest, masks)
    fonts = sorted(found.values(), key=lambda font: (font.family, font.digest))
    if not fonts:
        raise ValueError(f"{directory} holds no font that draws {CLASSES}.")
    drawn = np.stack([font.masks for font in fonts]).reshape(len(fonts), len(CLASSES), -1).astype(np.float32)
    means = drawn.mean(0)
    # The nearest mean by squared distance; the square of the drawn mask is common to all.
    scores = 2 * drawn @ means.T - (means**2).sum(1)
    is_own = scores.argmax(2) == np.arange(len(CLASSES))
    return [font for font, share in zip(fonts, is_own.mean(1), strict=True) if share > 0.5]


def draw(path: Path) -> np.ndarray | None:
    """Masks of all classes, each filling the template. None if a character is missing."""
    masks = []
    try:
        font = ImageFont.truetype(path, TEMPLATE)
        for character in CLASSES:
            left, top, right, bottom = font.getbbox(character)
            if not (0 < right - left < 4 * TEMPLATE and 0 < bottom - top < 4 * TEMPLATE):
                return None
            canvas = Image.new("L", (right - left, bottom - top))
            ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
            side = round(max(canvas.size) * 1.2)
            square = Image.new("L", (side, side))
            square.paste(canvas, ((side - canvas.width) // 2, (side - canvas.height) // 2))
            masks.append(np.asarray(square.resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)))
    except (OSError, ValueError):  # some files with a font's name are not fonts
        return None
    drawn = np.stack(masks)
    differ = len(np.unique(drawn.reshape(len(drawn), -1), axis=0)) == len(
        drawn
    )  # a missing character is drawn as a box
    return drawn if differ and drawn.any((1, 2)).all() else None


def divide(fonts: list[Typeface], seed: int) -> tuple[list[Typeface], list[Typeface]]:
    """Training and test fonts; no family is in both. Raises ValueError if there is only one family."""
    families = sorted({font.family for font in fonts})
    if len(families) < 2:
        raise ValueError(f"The fonts are of one family, {families[0]}; another is needed to test on.")
    random.Random(seed).shuffle(families)
    tested = set(families[: max(1, round(TEST_SHARE * len(families)))])
    return [f for f in fonts if f.family not in tested], [f for f in fonts if f.family in tested]


def by_family(fonts: list[Typeface]) -> list[list[Typeface]]:
    """Families have between one and dozens of fonts; drawing a family first gives each shape the same chance."""
    families = collections.defaultdict(list)
    for font in fonts:
        families[font.family].append(font)
    return list(families.values())


def images(fonts: list[Typeface], count: int, seed: int, batch: int = 500) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of images uint8 (B, 3, 32, 32) and labels, the classes in turn."""
    families = by_family(fonts)
    for start in range(0, count, batch):
        choice = random.Random(f"{seed} {start}")
        labels = [index % len(CLASSES) for index in range(start, min(start + batch, count))]

        def masks(labels: list[int], choice: random.Random = choice) -> Tensor:
            drawn = [choice.choice(choice.choice(families)).masks[label] for label in labels]
            return torch.from_numpy(np.stack(drawn))[:, None].float() / 255

        generator = torch.Generator().manual_seed(choice.getrandbits(60))
        characters = masks(labels)
        others = [masks([choice.randrange(len(CLASSES)) for _ in labels])]
        yield compose(characters, others, generator), labels


def compose(characters: Tensor, others: list[Tensor], generator: torch.Generator) -> Tensor:
    """A character (B, 1, H, W) in the middle, parts of others at the border, all distorted: uint8 (B, 3, 32, 32)."""
    batch = len(characters)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((batch, *shape), generator=generator)

    ground, ink = texture(uniform), texture(uniform)
    # At least slightly lighter or darker than the background, so that the character is legible.
    contrast = uniform(0.6, 0.9, 1, 1, 1) * torch.where(uniform(0, 1, 1, 1, 1) < 0.5, -1.0, 1.0)
    level = uniform(0.25, 0.75, 1, 1, 1)
    ground = ground + level - contrast / 2
    ink = ink + level + contrast / 2
    picture = ground
    for other in others:  # drawn before the character, so they never cover it
        angle = uniform(0, 2 * torch.pi, 1)
        away = 1.3 * torch.cat([angle.cos(), angle.sin()], 1) * uniform(0.85, 1.2, 1)
        picture = torch.lerp(picture, ink, distort(other, away, uniform))
    picture = torch.lerp(picture, ink, distort(characters, uniform(-0.15, 0.15, 2), uniform))
    # A line in the style of the background interrupts strokes.
    picture = torch.lerp(picture, ground, line(uniform))
    picture = torch.lerp(picture, F.avg_pool2d(picture, 3, 1, 1, count_include_pad=False), uniform(0, 1, 1, 1, 1))
    picture = picture + uniform(0.0, 0.06, 1, 1, 1) * torch.randn(picture.shape, generator=generator)
    return (255 * picture).round_().clamp_(0, 255).to(torch.uint8)


def texture(uniform) -> Tensor:
    """Blobs of several sizes, stripes, and a colour: (B, 3, 32, 32) around zero."""
    blobs = sum(
        F.interpolate(uniform(-0.15, 0.15, 3, size, size), SIDE, mode="bicubic") * uniform(0, 1, 1, 1, 1)
        for size in (2, 5, 11)
    )
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    angle, frequency, phase = (uniform(0, high, 1, 1, 1) for high in (torch.pi, 20, 2 * torch.pi))
    stripes = torch.sin(frequency * (rows * angle.sin() + columns * angle.cos()) + phase) * uniform(0, 0.12, 1, 1, 1)
    return blobs + stripes + uniform(-0.12, 0.12, 3, 1, 1)


def distort(masks: Tensor, centre: Tensor, uniform) -> Tensor:
    """Masks (B, 1, H, W) turned, sheared, scaled, bent, and moved to a centre (B, 2) in units of half the image's side.

    The masks are drawn at twice the resolution and averaged: (B, 1, 32, 32).
    """
    angle, shear = uniform(-0.2, 0.2, 1), uniform(-0.15, 0.15, 1)
    wide, high = uniform(0.8, 1, 1), uniform(0.8, 1, 1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 2).view(-1, 2, 2)
    bend = torch.stack([1 / wide, shear, torch.zeros_like(shear), 1 / high], 2).view(-1, 2, 2)
    matrix = bend @ turn
    affine = torch.cat([matrix, -matrix @ centre[:, :, None]], 2)
    grid = F.affine_grid(affine, [len(masks), 1, 2 * SIDE, 2 * SIDE], align_corners=False)
    warp = F.interpolate(uniform(-0.08, 0.08, 2, 4, 4), 2 * SIDE, mode="bicubic").permute(0, 2, 3, 1)
    return F.avg_pool2d(F.grid_sample(masks, grid + warp, align_corners=False), 2)


def line(uniform) -> Tensor:
    """A straight line anywhere across the image: (B, 1, 32, 32), 1 on it."""
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    angle, offset = uniform(0, torch.pi, 1, 1, 1), uniform(-0.7, 0.7, 1, 1, 1)
    distance = (rows * angle.cos() + columns * angle.sin() - offset).abs()
    return (1.5 - distance * SIDE / 2).clamp(0, 1)


def split(fonts: list[Typeface], count: int, seed: int) -> datasets.Dataset:
    """A table with the columns ``image`` and ``label``."""
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})

    def rows() -> Iterator[dict]:
        for pictures, labels in images(fonts, count, seed):
            for picture, label in zip(pictures.permute(0, 2, 3, 1).numpy(), labels, strict=True):
                yield {"image": Image.fromarray(picture), "label": label}

    with tempfile.TemporaryDirectory() as cache:
        return datasets.Dataset.from_generator(rows, kind, cache_dir=cache, keep_in_memory=True)


def write(directory: Path, fonts: list[Typeface], train: int, test: int, seed: int) -> None:
    """Both splits and a card below a directory."""
    parts = dict(zip(("train", "test"), divide(fonts, seed), strict=True))
    (directory / "data").mkdir(parents=True, exist_ok=True)
    for number, (name, count) in enumerate({"train": train, "test": test}.items()):
        rows = split(parts[name], count, 2 * seed + number)
        rows.to_parquet(directory / "data" / f"{name}-00000-of-00001.parquet")
    used = "\n".join(
        f"\n## Fonts of the {name} split ({len(group)} of {len(by_family(group))} families)\n\n"
        + "\n".join(f"- {font.family} `{font.digest}`" for font in group)
        for name, group in parts.items()
    )
    (directory / "README.md").write_text(
        f"---\nlicense: other\ntask_categories: [image-classification]\n---\n\n# Synthetic glyphs\n\n"
        f"{train:,} training and {test:,} test images, RGB, {SIDE}x{SIDE}, {len(CLASSES)} classes ({CLASSES}), seed "
        f"{seed}: characters of fonts, distorted, on textured grounds, by timm_eps's `benchmarks/glyphs.py`. No family "
        f"of fonts is in both splits. Each font is named with the beginning of its file's SHA-256.\n{used}\n",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--font_dir", type=Path, help="fonts; if not given, Debian's packages are fetched")
    parser.add_argument("--train", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.font_dir is None:
        args.font_dir = args.output.with_name(f"{args.output.name}-fonts")
        if not args.font_dir.exists():
            fetch_packages(args.font_dir)
    fonts = read_fonts(args.font_dir)
    write(args.output, fonts, args.train, args.test, args.seed)
    print(f"{args.train:,} and {args.test:,} images of {len(fonts)} fonts are in {args.output}.")


if __name__ == "__main__":
    main()
