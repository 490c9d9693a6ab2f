"""Build `assets/furniture.npz` and `assets/CREDITS.md` from Sweet Home 3D's CC0 furniture library, once.

The input is `BlendSwap-CC-0.sh3f` from the Debian package `sweethome3d-furniture` (1.8):

    apt-get download sweethome3d-furniture && dpkg -x sweethome3d-furniture_*.deb unpacked
    python tools/build_assets.py \
        unpacked/usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f fastvst/scenes/rooms/assets

An .sh3f file is a zip of Wavefront OBJ models (y up, front towards +z) and one .properties catalogue with names, sizes
in centimetres, the height of the surface that carries other objects, and the makers. Vertex clustering reduces a mesh
to at most 3,000 triangles; its vertices are stored as 16-bit fractions of the bounding box. Textures become JPEGs of
128 x 128 pixels.
"""

from __future__ import annotations

import argparse
import io
import posixpath
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.scenes.rooms.assets import TEXTURE_SIZE

MAX_TRIANGLES = 3000

# Catalogue id -> class name in common use. Models that are not listed are left out (trucks, fences, ...).
CLASSES = {
    "armchair": "office chair",
    "bed1": "bed",
    "bed2": "bed",
    "bedWithTexture": "bed",
    "bed3": "bed",
    "babyRockingBed": "crib",
    "bedsideTable2": "night stand",
    "bookcase": "bookshelf",
    "shelves": "shelves",
    "verticalShelves": "shelves",
    "cupboard": "cabinet",
    "wardrobeWithSlidingDoors": "wardrobe",
    "televisionCabinet": "tv stand",
    "led_tv": "television",
    "desklamp": "lamp",
    "JapaneseLantern": "lamp",
    "wallLight": "wall light",
    "doubleOven": "oven",
    "oven": "oven",
    "kitchenaid": "mixer",
    "coffeeBrewer": "coffee machine",
    "L_shaped_sofa": "sofa",
    "sofa": "sofa",
    "couch": "sofa",
    "couch2": "sofa",
    "sofa2": "sofa",
    "winchesterSofa": "sofa",
    "armchair2": "armchair",
    "modernArmchair": "armchair",
    "winchesterArmchair": "armchair",
    "oakChair": "chair",
    "plasticChair": "chair",
    "sillaBlanca": "chair",
    "chair": "chair",
    "antiqueChair": "chair",
    "chairWithCushion": "chair",
    "chair2": "chair",
    "osakaChair": "chair",
    "designChair": "chair",
    "thonet": "chair",
    "silla2": "stool",
    "stool": "stool",
    "stool2": "stool",
    "pianoBench": "bench",
    "bench": "bench",
    "oakTable": "table",
    "tableWithTablecloth": "table",
    "table": "table",
    "poolTable": "pool table",
    "table_football": "football table",
    "pianoAQueue": "piano",
    "desk": "desk",
    "lbDesk": "desk",
    "radiator1": "radiator",
    "radiator2": "radiator",
    "radiator": "radiator",
    "radiator3": "radiator",
    "speaker2": "speaker",
    "speaker3": "speaker",
    "tableFan": "fan",
    "riggedFan": "fan",
    "teddyBear": "teddy bear",
    "tetrapak": "milk carton",
    "yogurtBottle": "bottle",
    "mamadeira": "baby bottle",
    "caffe_final": "coffee cup",
    "plasticCup": "cup",
    "beerGlass": "glass",
    "bread": "bread",
    "deer": "deer figure",
    "toiletsUnit": "toilet",
    "bidet": "bidet",
    "washbasin": "sink",
    "modernVanity": "sink",
    "showerStall": "shower stall",
    "towel3": "towel rack",
    "urinal": "urinal",
    "potty": "potty",
    "dustbin": "trash can",
    "whiteBoard": "whiteboard",
    "ammoBox": "chest",
    "box": "box",
    "crate": "crate",
    "barrel": "barrel",
    "electricGuitar": "guitar",
    "littlePlant": "plant",
    "augalas": "plant",
    "decorativePlant": "plant",
    "orchids": "plant",
    "plant": "plant",
    "cactus": "plant",
    "basketball": "ball",
    "umbrellaFolded": "umbrella",
    "kalender": "calendar",
    "fireExtinguisher": "fire extinguisher",
    "caballito": "rocking horse",
    "cuckooClock": "clock",
    "briefcase": "briefcase",
    "handbag": "handbag",
    "refrigerator": "refrigerator",
    "largeFridge": "refrigerator",
    "drawersCabinet": "cabinet",
    "lowerCabinet": "cabinet",
    "highCabinet": "cabinet",
    "upperCabinet": "wall cabinet",
    "glassDoorCabinet": "wall cabinet",
    "sinkCabinet": "kitchen sink",
    "rangeHood": "range hood",
    "headphones": "headphones",
    "knifeStandSwap": "knife stand",
}


def read_catalogue(text: str) -> list[dict[str, str]]:
    """Entries of a Sweet Home 3D .properties catalogue: one dict for each numbered model."""
    entries: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        match = re.match(r"(\w+)#(\d+)=(.*)", line.strip())
        if match:
            entries.setdefault(int(match[2]), {})[match[1]] = match[3].strip()
    return [entries[number] for number in sorted(entries)]


def read_materials(text: str, folder: str) -> dict[str, dict[str, Any]]:
    """Material name -> {"rgb": diffuse colour (3 floats), "texture": path or None} of an MTL file."""
    materials: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "newmtl":
            current = materials[" ".join(words[1:])] = {"rgb": (0.8, 0.8, 0.8), "texture": None}
        elif words[0] == "Kd":
            current["rgb"] = tuple(float(w) for w in words[1:4])
        elif words[0] == "map_Kd":
            current["texture"] = posixpath.normpath(posixpath.join(folder, words[-1].replace("\\", "/")))
    return materials


@dataclass(frozen=True)
class ObjMesh:
    """A triangulated OBJ file.

    positions (V, 3); uvs (T, 2), the last of which is (0, 0); corners (F, 3, 2) index of position and uv; face_material
    (F,) index into `materials`, -1 before the first `usemtl`; libraries: names of MTL files.
    """

    positions: np.ndarray
    uvs: np.ndarray
    corners: np.ndarray
    face_material: np.ndarray
    materials: list[str]
    libraries: list[str]


def read_obj(text: str) -> ObjMesh:
    """Polygons become fans of triangles. A corner without uv gets the uv (0, 0)."""
    positions = []
    uvs = []
    corners = []
    face_material = []
    materials: list[str] = []
    libraries: list[str] = []
    material = -1
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        tag = words[0]
        if tag == "v":
            positions.append([float(w) for w in words[1:4]])
        elif tag == "vt":
            uvs.append([float(w) for w in words[1:3]])
        elif tag == "f":
            loop = [_corner(word, len(positions), len(uvs)) for word in words[1:]]
            for k in range(1, len(loop) - 1):
                corners.append([loop[0], loop[k], loop[k + 1]])
                face_material.append(material)
        elif tag == "usemtl":
            name = " ".join(words[1:])
            if name not in materials:
                materials.append(name)
            material = materials.index(name)
        elif tag == "mtllib":
            libraries.append(" ".join(words[1:]))
    uvs.append([0.0, 0.0])
    return ObjMesh(
        np.array(positions),
        np.array(uvs),
        np.array(corners, dtype=np.int64),
        np.array(face_material),
        materials,
        libraries,
    )


def _corner(word: str, positions: int, uvs: int) -> tuple[int, int]:
    """Indices of position and uv of "7", "7/3" or "7//2"; negative numbers count from the end, a missing uv is -1."""
    fields = word.split("/")
    p = int(fields[0])
    t = int(fields[1]) if len(fields) > 1 and fields[1] else 0
    uv = -1 if t == 0 else t - 1 if t > 0 else uvs + t
    return (p - 1 if p > 0 else positions + p), uv


def decimate(points: np.ndarray, size: np.ndarray, corners: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertex clustering on the finest cubic grid that leaves at most `limit` triangles.

    points (V, 3) in [0, 1]; size (3,) of the model in metres; corners (F, 3) indices of points.

    Returns:
        New positions of all points (V, 3), and the mask of remaining faces (F,).
    """
    metric = points * size

    def cluster(cell: float) -> tuple[np.ndarray, np.ndarray]:
        grid = np.floor(metric / cell + 0.5).astype(np.int64)
        _, inverse = np.unique(grid, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        count = np.bincount(inverse)[:, None]
        mean = np.stack([np.bincount(inverse, points[:, axis]) for axis in range(3)], 1) / count
        merged = inverse[corners]
        alive = (merged[:, 0] != merged[:, 1]) & (merged[:, 1] != merged[:, 2]) & (merged[:, 0] != merged[:, 2])
        _, first = np.unique(np.sort(merged, axis=1), axis=0, return_index=True)
        unique = np.zeros(len(corners), dtype=bool)
        unique[first] = True
        return mean[inverse], alive & unique

    if len(corners) <= limit:
        return points, np.ones(len(corners), dtype=bool)
    low = 1e-4
    high = float(size.max()) / 4
    for _ in range(14):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cluster(middle)[1].sum() > limit else (low, middle)
    return cluster(high)


def load_texture(data: bytes) -> bytes:
    """A texture as JPEG of TEXTURE_SIZE x TEXTURE_SIZE; transparent pixels get the mean colour of the opaque ones."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    pixels = np.asarray(image).astype(np.float64)
    opaque = pixels[..., 3:] / 255.0
    mean = (pixels[..., :3] * opaque).sum((0, 1)) / max(opaque.sum(), 1.0)
    flat = Image.fromarray((pixels[..., :3] * opaque + mean * (1 - opaque)).astype(np.uint8))
    buffer = io.BytesIO()
    flat.resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.LANCZOS).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def convert(
    archive: zipfile.ZipFile, entry: dict[str, str], textures: dict[str, int], blobs: list[bytes]
) -> dict[str, Any]:
    """One catalogue entry as quantised arrays, see `build` for the fields. Appends new textures to `blobs`."""
    path = entry["model"].lstrip("/")
    mesh = read_obj(archive.read(path).decode("latin-1"))
    points = mesh.positions
    if "modelRotation" in entry:
        points = points @ np.array([float(w) for w in entry["modelRotation"].split()]).reshape(3, 3).T
    # OBJ (x right, y up, z to the front) -> asset (x right, y to the back, z up)
    points = points[:, [0, 2, 1]] * np.array([1.0, -1.0, 1.0])
    points = _to_unit_box(points, mesh.corners)
    size = np.array([float(entry[k]) / 100 for k in ("width", "depth", "height")])
    points, alive = decimate(points, size, mesh.corners[..., 0], MAX_TRIANGLES)
    corners = mesh.corners[alive]
    face_material = mesh.face_material[alive]
    points = np.clip(_to_unit_box(points, corners), 0, 1)

    rgb, layer = _materials(archive, mesh, posixpath.dirname(path), textures, blobs)
    textured = layer[face_material] >= 0
    corner_uv = np.where(textured[:, None, None], mesh.uvs[corners[..., 1]], 0.0)
    # Textures repeat. Small coordinates are precise in float16.
    corner_uv = corner_uv - np.floor(corner_uv.min(1, keepdims=True))
    wedges = np.concatenate(
        [
            np.round(points[corners[..., 0]] * 65535),
            np.round(np.clip(corner_uv, 0, 60) * 1024),
            np.broadcast_to((face_material % len(rgb))[:, None, None], (len(corners), 3, 1)),
        ],
        axis=2,
    ).astype(np.int64)
    unique, index = np.unique(wedges.reshape(-1, 6), axis=0, return_inverse=True)
    return {
        "positions": unique[:, :3].astype(np.uint16),
        "uv": (unique[:, 3:5] / 1024).astype(np.float16),
        "material": unique[:, 5].astype(np.int64),
        "triangles": index.reshape(-1, 3).astype(np.uint16),
        "rgb": rgb,
        "layer": layer,
        "size": size,
    }


def _to_unit_box(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """`points` (V, 3), shifted and scaled so that those used by `corners` (F, 3, 2) fill [0, 1] on every axis."""
    used = points[np.unique(corners[..., 0])]
    low = used.min(0)
    return (points - low) / np.maximum(used.max(0) - low, 1e-9)


def _materials(
    archive: zipfile.ZipFile, mesh: ObjMesh, folder: str, textures: dict[str, int], blobs: list[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """Colours (M, 3) uint8 and texture layers (M,) int16 of the materials of a mesh; the last is the default."""
    known: dict[str, dict[str, Any]] = {}
    for library in mesh.libraries:
        known.update(read_materials(archive.read(posixpath.join(folder, library)).decode("latin-1"), folder))
    files = set(archive.namelist())
    rgb = []
    layer = []
    for name in [*mesh.materials, ""]:
        material = known.get(name, {"rgb": (0.8, 0.8, 0.8), "texture": None})
        # Some texture paths point to the disk of the maker.
        texture = material["texture"] if material["texture"] in files else None
        if texture is not None and texture not in textures:
            textures[texture] = len(blobs)
            blobs.append(load_texture(archive.read(texture)))
        layer.append(-1 if texture is None else textures[texture])
        rgb.append([255] * 3 if texture else [int(round(255 * min(max(c, 0.0), 1.0))) for c in material["rgb"]])
    return np.array(rgb, dtype=np.uint8), np.array(layer, dtype=np.int16)


def build(source: Path, folder: Path) -> Path:
    """Write furniture.npz and CREDITS.md into `folder`; returns the npz path.

    Arrays (N models, V vertices, F triangles, M materials, T textures): key, name (N,) str; size (N, 3) metres as
    width, depth, height; elevation, drop (N,) metres, drop < 0 if nothing can be put on it; vertex_start,
    triangle_start, material_start (N + 1,); positions (V, 3) uint16 fraction of the box; uv (V, 2) float16; material
    (V,) uint16 into the material tables; triangles (F, 3) uint16 into the model's own vertices; rgb (M, 3) uint8;
    layer (M,) int16 texture or -1; texture_bytes uint8 and texture_start (T + 1,): concatenated JPEG files.
    """
    textures: dict[str, int] = {}
    blobs: list[bytes] = []
    models = []
    rows = []
    credits = []
    with zipfile.ZipFile(source) as archive:
        entries = read_catalogue(archive.read("PluginFurnitureCatalog.properties").decode("latin-1"))
        for entry in entries:
            key = entry["id"].split("#")[1]
            if key not in CLASSES:
                continue
            models.append(convert(archive, entry, textures, blobs))
            height = float(entry["height"])
            drop = float(entry.get("dropOnTopElevation", height))
            rows.append((key, CLASSES[key], float(entry.get("elevation", 0)) / 100, drop / 100 if drop >= 0 else -1.0))
            credits.append((entry["name"], key, entry["creator"]))
    starts = {field: np.cumsum([0] + [len(m[field]) for m in models]) for field in ("positions", "triangles", "rgb")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "furniture.npz"
    np.savez_compressed(
        path,
        key=np.array([r[0] for r in rows]),
        name=np.array([r[1] for r in rows]),
        elevation=np.array([r[2] for r in rows], dtype=np.float32),
        drop=np.array([r[3] for r in rows], dtype=np.float32),
        size=np.array([m["size"] for m in models], dtype=np.float32),
        vertex_start=starts["positions"],
        triangle_start=starts["triangles"],
        material_start=starts["rgb"],
        positions=np.concatenate([m["positions"] for m in models]),
        uv=np.concatenate([m["uv"] for m in models]),
        material=np.concatenate([m["material"] + s for m, s in zip(models, starts["rgb"], strict=False)]).astype(
            np.uint16
        ),
        triangles=np.concatenate([m["triangles"] for m in models]),
        rgb=np.concatenate([m["rgb"] for m in models]),
        layer=np.concatenate([m["layer"] for m in models]),
        texture_bytes=np.frombuffer(b"".join(blobs), dtype=np.uint8),
        texture_start=np.cumsum([0] + [len(b) for b in blobs]),
    )
    (folder / "CREDITS.md").write_text(credits_page(credits), encoding="utf-8")
    return path


def credits_page(credits: list[tuple[str, str, str]]) -> str:
    """CREDITS.md from (name, catalogue id, maker) of every model."""
    lines = [
        "# Furniture models",
        "",
        "`furniture.npz` holds simplified copies of models published on blendswap.com under CC0 1.0 (public domain), "
        "collected and converted to OBJ by Emmanuel Puybaret for Sweet Home 3D (library `BlendSwap-CC-0`, version "
        "1.8). CC0 asks for no credit; the makers are named here with thanks.",
        "",
        "| model | catalogue id | maker |",
        "| --- | --- | --- |",
        *[f"| {name} | {key} | {maker} |" for name, key, maker in credits],
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("source", type=Path, help="BlendSwap-CC-0.sh3f")
    parser.add_argument("folder", type=Path, help="output folder")
    arguments = parser.parse_args()
    path = build(arguments.source, arguments.folder)
    with np.load(path, allow_pickle=False) as pack:
        print(
            f"{path}: {len(pack['key'])} models, {len(pack['triangles'])} triangles, "
            f"{len(pack['texture_start']) - 1} textures, {path.stat().st_size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
