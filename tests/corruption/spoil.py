"""Ways to spoil a file. Each returns a function of the folder that holds it.

What cells of a patient hold in here is `SECRET` or `NUMBER`; neither may ever be printed.
"""

import gzip
import json
import math
import os
import shutil
import struct
import zlib

import nibabel as nib
import numpy as np
import SimpleITK
import yaml
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SECRET, NUMBER = "Zq7secret", "98765.4321"
GRID = np.diag([2.0, 2.0, 2.0, 1.0])


def volume(shape=(16, 18, 14), dtype=np.int16, seed=0):
    """Return a bright ball on dark ground, a little noisy, in numbers from 0 to 99."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    ball = 80 * np.exp(-3 * sum(axis**2 for axis in axes))
    return (ball + np.random.default_rng(seed).integers(0, 9, shape)).astype(dtype)


def put(name, content):
    """Write these bytes."""

    def spoil(folder):
        (folder / name).write_bytes(content)

    return spoil


def cut(name, keep):
    """Keep the first bytes, or that share of them."""

    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])

    return spoil


def flip(name, at):
    """Change one byte."""

    def spoil(folder):
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 0xFF
        (folder / name).write_bytes(bytes(data))

    return spoil


def instead(name, *then, of=None):
    """Remove a file, then do something else."""

    def spoil(folder):
        path = folder / (of or name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for step in then:
            step(folder)

    return spoil


def link(name, target):
    """Put a link in a file's place."""

    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def all_of(*steps):
    """Do one after the other."""

    def spoil(folder):
        for step in steps:
            step(folder)

    return spoil


def emptied(folder):
    """Remove every file."""
    for path in folder.iterdir():
        path.unlink()


def folder_named(name):
    """Put an empty folder in a file's place."""
    return instead(name, lambda folder: (folder / name).mkdir())


def locked(name):
    """Take away the right to read."""

    def spoil(folder):
        (folder / name).chmod(0)

    return spoil


def renamed(name, other):
    """Give a file another name."""

    def spoil(folder):
        (folder / name).rename(folder / other)

    return spoil


# --- Scans ---------------------------------------------------------------------------------------


def nifti(name="t1.nii.gz", values=None, **header):
    """Write a NIfTI file; `header` sets fields afterwards, whatever they say."""

    def spoil(folder):
        image = nib.Nifti1Image(volume() if values is None else values, GRID)
        image.header.set_xyzt_units("mm")
        raw = bytearray(image.to_bytes())
        for field, value in header.items():
            dtype, offset = nib.nifti1.header_dtype.fields[field][:2]
            part = np.zeros(1, dtype)
            part[...] = np.asarray(value, dtype.base)
            raw[offset : offset + dtype.itemsize] = part.tobytes()
        content = gzip.compress(bytes(raw), 1, mtime=0) if name.endswith(".gz") else bytes(raw)
        (folder / name).write_bytes(content)

    return spoil


def with_voxel(value):
    """Write a scan, one voxel of which has this value."""
    values = volume(dtype=np.float32)
    values[3, 4, 5] = value
    return nifti(values=values)


def colours(folder):
    """Write a NIfTI file of colours."""
    values = np.zeros((8, 8, 8), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    values["R"] = volume((8, 8, 8), np.uint8)
    nib.save(nib.Nifti1Image(values, GRID), folder / "t1.nii.gz")


def bomb(name, shape):
    """Write a `.nii.gz` that really holds all its header says: a thousand times its own size."""

    def spoil(folder):
        head = bytearray(nib.Nifti1Image(volume((2, 2, 2)), GRID).to_bytes()[:352])
        head[40:56] = struct.pack("<8h", 3, *shape, 1, 1, 1, 1)
        # Packed files one after the other unpack to their contents one after the other.
        block = 1 << 24
        zeros = gzip.compress(bytes(block), 9, mtime=0)
        first = gzip.compress(bytes(head) + bytes(range(256)), 9, mtime=0)
        count = -(-2 * math.prod(shape) // block)
        (folder / name).write_bytes(first + zeros * count)

    return spoil


def nrrd(data_file=None, sizes="16 18 14", content=None, encoding="raw", name="t1.nrrd"):
    """Write an NRRD file in place of t1.nii.gz, header first."""
    head = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
        f"sizes: {sizes}\nspace directions: (2,0,0) (0,2,0) (0,0,2)\nendian: little\n"
        f"encoding: {encoding}\nspace origin: (0,0,0)\n"
        + (f"data file: {data_file}\n" if data_file else "")
        + "\n"
    )
    body = volume().tobytes() if content is None else content

    def spoil(folder):
        (folder / "t1.nii.gz").unlink()
        (folder / name).write_bytes(head.encode() + (b"" if data_file else body))

    return spoil


def metaimage(data_file, sizes="16 18 14", name="t1.mhd", dims=3):
    """Write a MetaImage header in place of t1.nii.gz, with its voxels in another file."""
    head = (
        f"ObjectType = Image\nNDims = {dims}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"DimSize = {sizes}\nElementSpacing = 2 2 2\nElementType = MET_SHORT\n"
        f"ElementDataFile = {data_file}\n"
    )

    def spoil(folder):
        (folder / "t1.nii.gz").unlink()
        (folder / name).write_bytes(head.encode())

    return spoil


def beside(name="voxels.raw"):
    """Write voxels beside the patient directory: a file that nobody may reach from inside."""

    def spoil(folder):
        (folder.parent / name).write_bytes(volume().tobytes())

    return spoil


def sitk(name):
    """Write the scan with SimpleITK in place of t1.nii.gz."""

    def spoil(folder):
        (folder / "t1.nii.gz").unlink()
        image = SimpleITK.GetImageFromArray(volume((14, 18, 16)))
        image.SetSpacing((2.0, 2.0, 2.0))
        SimpleITK.WriteImage(image, str(folder / name))

    return spoil


def dicom(folder_name="t1", slices=8, skip=(), series="1.2.826.0.1.7", patient="MRN-0042", **tags):
    """Write a classic DICOM series in place of the scan of that name."""

    def spoil(folder):
        for old in folder.glob(f"{folder_name}.*"):
            old.unlink()
        write_series(folder / folder_name, slices, skip, series, patient, **tags)

    return spoil


def second_series(folder):
    """Add a series of the same patient to the folder of the first."""
    write_series(folder / "t1", series="1.2.826.0.1.8")


def write_series(place, slices=8, skip=(), series="1.2.826.0.1.7", patient="MRN-0042", **tags):
    """Write a classic DICOM series: one CT file per slice, 2 mm apart."""
    place.mkdir(exist_ok=True)
    voxels = volume((slices, 16, 18), np.uint16)
    for k in range(slices):
        if k in skip:
            continue
        uid = f"{series}.{k + 1}"
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = uid
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, uid
        data.SeriesInstanceUID, data.StudyInstanceUID = series, f"{series}.0"
        data.FrameOfReferenceUID = f"{series}.9"
        data.PatientID, data.PatientName, data.Modality = patient, "Doe^Jane", "CT"
        data.Rows, data.Columns = voxels.shape[1:]
        data.PixelSpacing, data.SliceThickness = [2.0, 2.0], 2.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [0.0, 0.0, 2.0 * k]
        data.InstanceNumber = k + 1
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        data.PixelData = voxels[k].tobytes()
        for keyword, value in tags.items():
            setattr(data, keyword, value(k) if callable(value) else value)
        data.save_as(place / f"{series.split('.')[-1]}_{k:03d}.dcm", enforce_file_format=True)


def png(width, height, name="photo.png"):
    """Write a PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 4096)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    )
    return put(name, content)


def pages(folder):
    """Write a TIFF of two pages in the picture's place."""
    (folder / "photo.png").unlink()
    first, second = (Image.fromarray(volume((24, 20), np.uint8, s)) for s in (1, 2))
    first.save(folder / "photo.tif", save_all=True, append_images=[second])


# --- Tables --------------------------------------------------------------------------------------


def cell(column, text, name="ehr.csv"):
    """Write this into one cell."""

    def spoil(folder):
        header, row = (folder / name).read_text(encoding="utf-8").splitlines()
        names, cells = header.split(","), row.split(",")
        cells[names.index(column)] = text
        (folder / name).write_text(f"{header}\n{','.join(cells)}\n", encoding="utf-8")

    return spoil


def swap(name, old, new, count=1):
    """Replace text that must be there."""

    def spoil(folder):
        text = (folder / name).read_bytes().decode()
        assert old in text, (name, old)
        (folder / name).write_bytes(text.replace(old, new, count).encode())

    return spoil


def again(name, line):
    """Repeat a line at the end."""

    def spoil(folder):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        (folder / name).write_text("\n".join([*lines, lines[line]]) + "\n", encoding="utf-8")

    return spoil


def as_json(text):
    """Write this JSON in the table's place."""
    return instead("ehr.csv", put("ehr.json", text.encode()), of="ehr.csv")


# --- Descriptions and bundles --------------------------------------------------------------------


def edit(name, change):
    """Change what a YAML or JSON file holds."""

    def spoil(folder):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        data = change(data) or data
        path.write_text(
            json.dumps(data) if name.endswith(".json") else yaml.safe_dump(data, sort_keys=False),
            encoding="utf-8",
        )

    return spoil


def at(*path, to=None, drop=False, key=None):
    """Return a change of the value at a path: another value, none at all, or under another key."""

    def change(data):
        for step in path[:-1]:
            data = data[step]
        if drop:
            del data[path[-1]]
        elif key is not None:
            data[key] = data.pop(path[-1])
        else:
            data[path[-1]] = to

    return change


def laughs(depth=60):
    """Return YAML whose aliases stand for 2^depth words."""
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


def append(name, text):
    """Add text at the end."""

    def spoil(folder):
        with (folder / name).open("a", encoding="utf-8") as stream:
            stream.write(text)

    return spoil


def resummed(spoil):
    """Spoil a bundle and make its checksums right again, as somebody who means it would."""

    def and_sum(folder):
        from dymo_med.bundle import checksums_of

        spoil(folder)
        (folder / "checksums.json").write_text(json.dumps(checksums_of(folder)), encoding="utf-8")

    return and_sum


def tensors(name, change):
    """Change what a safetensors file holds; its checksum fits."""

    def spoil(folder):
        from safetensors.torch import load_file, save_file

        path = folder / "models" / f"{name}.safetensors"
        parts = load_file(path)
        key = sorted(k for k in parts if parts[k].is_floating_point() and parts[k].ndim)[0]
        change(parts, key)
        save_file(parts, path)

    return resummed(spoil)


def nobody(parts, _):
    """Let statistics be borrowed from a subset that is not there."""
    parts["borrowed_from"] += 10**6


def one_weight(parts, key):
    """Let one number be such as no training leads to."""
    parts[key].view(-1)[0] = -1e9


def pipe(name):
    """Put a pipe in a file's place, which waits for ever for somebody who writes."""

    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def more_modalities(number):
    """Describe the first modality so many times, under other names."""

    def change(data):
        first = data["modalities"][0]
        data["modalities"] += [{**first, "name": f"m{i}"} for i in range(number)]
        return data

    return change


def link_out(name):
    """Move a bundle's file out of it, and link to that."""

    def spoil(folder):
        outside = folder.parent / "elsewhere"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return spoil


def sparse(name, size):
    """Let a file have a size, and no content."""

    def spoil(folder):
        os.truncate(folder / name, size)

    return spoil


def everything(folder):
    """Return the names and times of all that a folder holds, to see whether something changed."""
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in folder.rglob("*")}


def lists(depth):
    """Return JSON of lists in lists."""
    return "[" * depth + "]" * depth


ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
