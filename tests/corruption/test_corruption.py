"""Spoilt input of every sort, through every command that meets it.

A new case is one line in one of the tables: its name, how to spoil the folder, and words that the
message must hold. For each the exit code is the documented one, there is one message per problem
that says where, what, what was expected or found, and what to do; nothing is written, no field's
value is printed, there is no traceback, and memory stays bounded.
"""

import csv
import gzip
import json
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

import dymo_med.inference.check  # noqa: F401 (before it is patched)
from dymo_med.cli import main
from tests.conftest import COHORT, write_patient
from tests.corruption.spoil import (
    NUMBER,
    ROOT,
    SECRET,
    again,
    all_of,
    append,
    as_json,
    at,
    beside,
    bomb,
    cell,
    colours,
    cut,
    dicom,
    edit,
    emptied,
    everything,
    flip,
    folder_named,
    instead,
    laughs,
    link,
    link_out,
    lists,
    locked,
    metaimage,
    more_modalities,
    nifti,
    nobody,
    nrrd,
    one_weight,
    pages,
    pipe,
    png,
    put,
    renamed,
    resummed,
    second_series,
    sitk,
    sparse,
    swap,
    tensors,
    volume,
    with_voxel,
)
from tests.unit.conftest import RECIPE

# What a command may need beyond what the process has when it starts.
MOST_BYTES = 1 << 30

T1, EHR, PHOTO = "t1.nii.gz", "ehr.csv", "photo.png"

text_in_it = put("t1/a.txt", b"text")

PATIENT = [
    # name, how to spoil a patient directory, the message must hold
    ("scan of zero bytes", put(T1, b""), [T1, "empty"]),
    ("scan cut in its header", cut(T1, 60), [T1]),
    ("scan cut in its voxels", cut(T1, 0.6), [T1]),
    ("scan with a flipped byte", flip(T1, 2000), [T1]),
    ("scan with text in it", put(T1, gzip.compress(b"not an image at all")), [T1]),
    ("scan that is no gzip", put(T1, b"\x00\x01 no gzip" * 99), [T1]),
    ("scan with wrong magic", nifti(magic=b"n+9"), [T1]),
    ("scan of unknown type", nifti(datatype=77), [T1]),
    ("scan with voxels beyond the file", nifti(vox_offset=1e6), [T1]),
    ("voxel that is NaN", with_voxel(np.nan), [T1, "finite"]),
    ("voxel that is infinite", with_voxel(np.inf), [T1, "finite"]),
    ("scan of NaN", nifti(values=np.full((9, 9, 9), np.nan, "f4")), [T1, "finite"]),
    ("scan without contrast", nifti(values=np.full((9, 9, 9), 7, "i2")), [T1, "same value"]),
    ("scan with 4 axes", nifti(values=volume((9, 9, 9, 2))), [T1, "4", "(9, 9, 9, 2)"]),
    ("scan that is a slice", nifti(values=volume((9, 9, 1))), [T1, "slice"]),
    ("scan of colours", colours, [T1, "colours"]),
    ("scan of no voxel", nifti(dim=[3, 0, 9, 9, 1, 1, 1, 1]), [T1]),
    ("scan of negative size", nifti(dim=[3, -9, 9, 9, 1, 1, 1, 1]), [T1]),
    ("scan that claims 16 GB", nifti(dim=[3, 2048, 2048, 2048, 1, 1, 1, 1]), [T1, "size"]),
    ("scan that claims 4 GB", nifti(dim=[3, 1024, 1024, 2000, 1, 1, 1, 1]), [T1]),
    (
        "scan that claims 16 GB, not packed",
        instead(T1, nifti("t1.nii", dim=[3, 2048, 2048, 2048, 1, 1, 1, 1])),
        ["t1.nii", "size"],
    ),
    ("zip bomb", bomb(T1, (1024, 1024, 400)), [T1]),
    ("header without geometry", nifti(srow_x=0, srow_y=0, srow_z=0), [T1, "geometry"]),
    ("header with geometry of NaN", nifti(srow_x=[np.nan] * 4), [T1]),
    ("header with flat geometry", nifti(srow_z=[0, 2, 0, 0]), [T1, "geometry"]),
    ("header with two geometries", nifti(qform_code=2, qoffset_x=500), [T1, "differ"]),
    ("folder in a scan's place", folder_named(T1), [T1]),
    ("scan that links to itself", link(T1, T1), [T1, "link"]),
    ("scan that links to nothing", link(T1, "gone.nii.gz"), [T1, "link"]),
    ("scan that cannot be opened", locked(T1), [T1, "permission"]),
    ("scan of unknown format", renamed(T1, "t1.img"), ["t1.img", "format"]),
    ("scan in capitals", renamed(T1, "T1.nii.gz"), ["T1.nii.gz", "capital"]),
    ("two files for one scan", all_of(nifti("t1.nii"), nrrd()), ["t1.nii", "t1.nrrd"]),
    ("NRRD cut short", nrrd(content=b"\0" * 99), ["t1.nrrd"]),
    ("NRRD without header", instead(T1, put("t1.nrrd", b"no header")), ["t1.nrrd"]),
    ("NRRD that claims 16 GB", nrrd(sizes="2048 2048 2048"), ["t1.nrrd", "size"]),
    (
        "NRRD with data elsewhere",
        all_of(beside(), nrrd(data_file="../voxels.raw", name="t1.nhdr")),
        ["t1.nhdr"],
    ),
    (
        "MetaImage with data elsewhere",
        all_of(beside(), metaimage("../voxels.raw")),
        ["t1.mhd"],
    ),
    ("MetaImage with data at a system file", metaimage("/etc/passwd"), ["t1.mhd"]),
    ("MetaImage without its data", metaimage("gone.raw"), ["t1.mhd"]),
    ("MetaImage that claims 16 GB", metaimage(PHOTO, "2048 2048 2048"), ["t1.mhd"]),
    ("MetaImage of 9 axes", metaimage(PHOTO, "2 2 2 2 2 2 2 2 2", dims=9), ["t1.mhd"]),
    ("MetaImage cut short", all_of(sitk("t1.mha"), cut("t1.mha", 0.5)), ["t1.mha"]),
    ("DICOM without a slice", dicom(skip=(3,)), ["slices"]),
    ("DICOM of two series", all_of(dicom(), second_series), ["series"]),
    ("DICOM with a slice cut short", all_of(dicom(), cut("t1/7_003.dcm", 0.7)), ["t1"]),
    ("DICOM with text in it", all_of(dicom(), put("t1/7_003.dcm", b"no DICOM")), ["t1"]),
    (
        "folder without DICOM",
        all_of(folder_named(T1), renamed(T1, "t1"), text_in_it),
        ["t1"],
    ),
    (
        "scan of another patient",
        all_of(dicom(), dicom("t2", series="1.2.826.0.1.9", patient="MRN-0043")),
        ["different patients", "in t2 than in t1"],
    ),
    ("picture of zero bytes", put(PHOTO, b""), [PHOTO, "empty"]),
    ("picture cut short", cut(PHOTO, 0.6), [PHOTO]),
    ("picture with a flipped byte", flip(PHOTO, 60), [PHOTO]),
    ("picture that is text", put(PHOTO, b"not a picture " * 20), [PHOTO]),
    ("picture that claims 3 GB", png(60_000, 60_000), [PHOTO]),
    ("picture that claims more than its data", png(9_000, 9_000), [PHOTO]),
    ("several pictures in one file", pages, ["photo.tif", "several"]),
    ("folder in a picture's place", folder_named(PHOTO), [PHOTO]),
    ("volume in a picture's place", instead(PHOTO, nifti("photo.nii.gz")), ["photo", "volume"]),
    ("table of zero bytes", put(EHR, b""), [EHR, "empty"]),
    ("table without a row", put(EHR, b"age,sex\n"), [EHR, "row"]),
    ("table of two rows", again(EHR, 1), [EHR, "rows"]),
    ("unknown category", cell("sex", SECRET), [EHR, "column sex", "F or M"]),
    ("number out of range", cell("age", NUMBER), [EHR, "column age", "0 to 120"]),
    ("text for a number", cell("age", SECRET), [EHR, "column age", "number"]),
    ("number that is NaN", cell("age", "NaN"), [EHR, "column age", "finite"]),
    ("number beyond all numbers", cell("age", "9e999"), [EHR, "column age"]),
    ("number of a million digits", cell("age", "9" * 1_000_000), [EHR]),
    ("quote that never ends", cell("age", f'"{SECRET}'), [EHR]),
    ("cell too many", cell("age", f"61,{SECRET}"), [EHR, "cells"]),
    ("column twice", swap(EHR, "age,sex", "age,age"), [EHR, "twice"]),
    ("column in capitals", swap(EHR, "age", "Age"), [EHR, "capital"]),
    ("table in two encodings", put(EHR, b"age,sex\n61,\xc3\xa9\xe9\n"), [EHR, "UTF-8"]),
    ("table with NUL bytes", put(EHR, b"age,sex\n6\x001,F\n"), [EHR]),
    ("table in random bytes", put(EHR, bytes(range(256)) * 9), [EHR]),
    ("folder in a table's place", folder_named(EHR), [EHR]),
    ("table that links to itself", link(EHR, EHR), [EHR, "link"]),
    ("table that cannot be opened", locked(EHR), [EHR]),
    ("table in two formats", put("ehr.json", b'{"age": 61}'), [EHR, "ehr.json"]),
    ("JSON that is none", as_json('{"age": 61,}'), ["ehr.json", "JSON"]),
    ("JSON too deep", as_json(lists(100_000)), ["ehr.json", "JSON"]),
    ("JSON with a name twice", as_json('{"age": 61, "age": 62}'), ["ehr.json", "twice"]),
    ("JSON of two rows", as_json('[{"age": 61}, {"age": 62}]'), ["ehr.json", "row"]),
    (
        "JSON with a list in a cell",
        as_json(f'{{"age": ["{SECRET}"], "ldh": 200}}'),
        ["ehr.json", "age"],
    ),
    ("JSON that is a number", as_json(NUMBER), ["ehr.json", "row"]),
    ("JSON with NaN", as_json('{"age": NaN, "ldh": 200}'), ["ehr.json", "age", "finite"]),
    ("nothing in the folder", emptied, ["nothing was observed", T1]),
]
C, L, S = "cohort.yaml", "labels.csv", "splits.csv"
T1_OF = ("modalities", "t1")
AGE = ("modalities", "demographics", "columns", "age")

DESCRIPTION = [
    # name, how to spoil a cohort's folder, the message must hold
    ("no description", instead(C), [C, "no such file"]),
    ("description in another encoding", put(C, "name: caf\xe9".encode("latin-1")), [C, "UTF-8"]),
    ("description of zero bytes", put(C, b""), [C, "mapping"]),
    ("description that is a list", put(C, b"- a\n- b\n"), [C, "mapping"]),
    ("description that is no YAML", append(C, "x: ["), [C, "YAML"]),
    ("description with a tab", append(C, "x:\n\t- y\n"), [C, "YAML"]),
    ("description that runs code", append(C, "x: !!python/object/apply:os.getcwd []\n"), [C]),
    ("description of a billion laughs", append(C, laughs()), [C, "YAML"]),
    ("description that contains itself", append(C, "x: &x [*x]\n"), [C, "YAML"]),
    ("description too deep", append(C, f"x: {lists(600)}\n"), [C, "YAML"]),
    (
        "description of 17 MB",
        append(C, "# " + "x" * (17 << 20) + "\n"),
        [C, "larger than what is read"],
    ),
    ("key twice", append(C, "name: again\n"), [C, "name", "twice"]),
    ("unknown key", edit(C, at("patients_folder", to="p")), [C, "unknown key", "patients"]),
    ("misspelt key", edit(C, at(*T1_OF, "spacing_mm", key="spacing")), [C, "spacing_mm"]),
    ("no task", edit(C, at("task", drop=True)), [C, "task"]),
    ("unknown kind", edit(C, at(*T1_OF, "kind", to="imgae")), [C, "Did you mean 'image'"]),
    ("no kind", edit(C, at(*T1_OF, "kind", drop=True)), [C, "kind"]),
    ("class twice", edit(C, at("task", "classes", to=["low", "low", "high"])), [C, "twice"]),
    ("classes that YAML reads as booleans", swap(C, "- low", "- no"), [C, "Quote"]),
    ("one class", edit(C, at("task", "classes", to=["low"])), [C, "classes"]),
    ("size of no voxel", edit(C, at(*T1_OF, "size", to=[0, 16, 16])), [C, "size"]),
    ("size of two axes", edit(C, at(*T1_OF, "size", to=[16, 16])), [C, "size"]),
    (
        "spacing of NaN",
        edit(C, at(*T1_OF, "spacing_mm", to=[2, 2, float("nan")])),
        [C, "spacing_mm"],
    ),
    ("spacing that is text", edit(C, at(*T1_OF, "spacing_mm", to="2 mm")), [C, "spacing_mm"]),
    ("four dimensions", edit(C, at(*T1_OF, "dims", to=4)), [C, "dims"]),
    ("file outside the folder", edit(C, at(*T1_OF, "file", to="../t1.nii.gz")), [C, "inside"]),
    ("file by an absolute path", edit(C, at(*T1_OF, "file", to="/etc/passwd")), [C, "inside"]),
    ("patients outside", edit(C, at("patients", to="../..")), [C, "inside"]),
    ("labels by an absolute path", edit(C, at("labels", to="/etc/passwd")), [C, "inside"]),
    ("unknown column type", edit(C, at(*AGE, "type", to="number")), [C, "type"]),
    ("range the wrong way", edit(C, at(*AGE, "range", to=[120, 0])), [C, "range"]),
    ("range of three", edit(C, at(*AGE, "range", to=[0, 60, 120])), [C, "range"]),
    ("range without end", edit(C, at(*AGE, "range", to=[0, float("inf")])), [C, "range"]),
    ("categories that YAML reads as booleans", swap(C, "- F\n", "- no\n"), [C, "quote"]),
    ("name that networks use", edit(C, at("modalities", "t1", key="forward")), [C, "forward"]),
    ("name with a space", edit(C, at("modalities", "t1", key="t 1")), [C, "name"]),
    ("no labels", instead(L), [L, "no such file"]),
    ("labels of zero bytes", put(L, b""), [L]),
    ("labels in another encoding", append(L, "p\0\n"), [L]),
    ("labels in random bytes", put(L, bytes(range(256)) * 9), [L, "UTF-8"]),
    ("labels without the target", swap(L, "grade", "grades"), [L, "grade"]),
    ("unknown class", swap(L, ",low", f",{SECRET}"), [L, "class", "low or high"]),
    ("record twice", again(L, 1), [L, "twice"]),
    ("id that leaves the folder", append(L, "../p000,p000,low\n"), [L, "id"]),
    ("row with a cell too many", append(L, "p000_v9,p000,low,1\n"), [L, "cells"]),
    ("record without a folder", append(L, "p000_v9,p000,low\n"), [L, "p000_v9", "directory"]),
    ("no splits", instead(S), [S, "no such file"]),
    ("unknown split", swap(S, "train", "trian"), [S, "train"]),
    ("patient in two splits", append(S, "p000,test\n"), [S, "two splits"]),
    ("patient without a split", swap(S, "p000,train\n", ""), [S, "p000"]),
]

R = "recipe.yaml"
IMPUTER = ("imputer",)

RECIPE_CASES = [
    # name, how to spoil the folder of a recipe, the message must hold
    ("no recipe", instead(R), [R, "no such file"]),
    ("recipe that is a folder", folder_named(R), [R]),
    ("recipe that is no YAML", append(R, "x: {"), [R, "YAML"]),
    ("recipe that links to itself", link(R, R), [R]),
    ("recipe of a billion laughs", append(R, laughs()), [R, "YAML"]),
    ("recipe with a misspelt key", edit(R, at("imputer_training", key="imputer_trainign")), [R]),
    ("recipe without a backbone", edit(R, at("backbone", drop=True)), [R, "backbone"]),
    ("unknown imputer", edit(R, at(*IMPUTER, "name", to="mopo")), [R, "Did you mean 'mopoe'"]),
    ("imputer without a name", edit(R, at(*IMPUTER, "name", drop=True)), [R, "name"]),
    ("misspelt option", edit(R, at(*IMPUTER, "latent", key="latnet")), [R, "'latent'"]),
    ("option that is text", edit(R, at(*IMPUTER, "latent", to="six")), [R, "latent"]),
    ("option that is negative", edit(R, at(*IMPUTER, "latent", to=-6)), [R, "latent"]),
    ("option beyond all numbers", edit(R, at(*IMPUTER, "latent", to=10**400)), [R, "64 bits"]),
    ("seed below 0", edit(R, at("seed", to=-1)), [R, "seed"]),
    ("unknown selector", edit(R, at("selector", "name", to="dyno")), [R, "Did you mean 'dymo'"]),
    ("comparator twice", edit(R, at("comparators", to=["moddrop", "moddrop"])), [R, "twice"]),
]

QUALITY, SELECTORS = "configs/quality.json", "configs/selectors.json"
CARD, META, INFERENCE = "docs/README.md", "configs/metadata.json", "configs/inference.json"
CALIBRATION, CONFORMAL = "configs/calibration.json", "configs/conformal.json"
WEIGHTS, SUMS = "models/backbone.safetensors", "checksums.json"

BUNDLE = [
    # name, how to spoil a bundle, the message must hold
    ("no description", instead(META), ["not a bundle", META]),
    ("changed weight", flip(WEIGHTS, -1), [WEIGHTS, "changed"]),
    ("changed card", append(CARD, "Better than it is."), [CARD, "changed"]),
    ("weights cut short", cut(WEIGHTS, 0.5), [WEIGHTS, "changed"]),
    ("absent weights", instead(WEIGHTS), [WEIGHTS, "absent"]),
    ("added file", put("models/more.safetensors", b"x"), ["models/more.safetensors", "not part"]),
    ("no checksums", instead(SUMS), [SUMS]),
    ("checksums of zero bytes", put(SUMS, b""), [SUMS, "JSON"]),
    ("checksums that are a list", put(SUMS, b"[]"), [SUMS]),
    ("checksums too deep", put(SUMS, lists(100_000).encode()), [SUMS, "deep"]),
    ("checksums of a file outside", edit(SUMS, at("../../etc/passwd", to="0" * 64)), ["passwd"]),
    ("weights that lead outside", link_out(WEIGHTS), [WEIGHTS, "out of the bundle"]),
    ("weights that link to themselves", link(WEIGHTS, "backbone.safetensors"), [WEIGHTS]),
    ("other format", resummed(edit(META, at("schema_version", to=99))), ["schema_version 2", "99"]),
    ("newer version", resummed(edit(META, at("version", to="99.0"))), ["99.0", "newer"]),
    ("version that is none", resummed(edit(META, at("version", to="new"))), ["new"]),
    ("no format", resummed(edit(META, at("schema_version", drop=True))), ["version"]),
    ("description that is a list", resummed(put(META, b"[]")), ["version"]),
    ("description too deep", resummed(put(META, lists(100_000).encode())), [META, "deep"]),
    ("description of 70 MB", resummed(sparse(META, 70 << 20)), [META, "larger", "64 MiB"]),
    ("key twice", resummed(swap(INFERENCE, "{", '{"temperature": 1.0, ')), [INFERENCE, "twice"]),
    (
        "temperature of NaN",
        resummed(edit(INFERENCE, at("temperature", to=float("nan")))),
        [INFERENCE, "finite"],
    ),
    (
        "temperature of 1e999",
        resummed(swap(INFERENCE, "{", '{"t": 1e999, ')),
        [INFERENCE, "finite"],
    ),
    ("temperature of 0", resummed(edit(INFERENCE, at("temperature", to=0))), ["temperature"]),
    ("temperature of 1e6", resummed(edit(INFERENCE, at("temperature", to=1e6))), ["temperature"]),
    ("temperature of 1e-9", resummed(edit(INFERENCE, at("temperature", to=1e-9))), ["temperature"]),
    ("negative patients", resummed(edit(CALIBRATION, at("patients", to=-1))), ["version"]),
    ("patients in words", resummed(edit(CALIBRATION, at("patients", to="many"))), ["version"]),
    ("half a patient", resummed(edit(CALIBRATION, at("fitted_on", to=0.5))), ["version"]),
    ("counts without answers", resummed(edit(CALIBRATION, at("right", to={}))), ["version"]),
    ("sets at another level", resummed(edit(CONFORMAL, at("coverage", to=0.5))), ["version"]),
    (
        "a bound without patients",
        resummed(edit(CONFORMAL, at("scores", "dymo", "", to={"patients": 3, "bound": 0.1}))),
        ["version"],
    ),
    ("bounds that are a list", resummed(put(CONFORMAL, b"[]")), ["version"]),
    ("class shares beyond 1", resummed(edit(INFERENCE, at("base_rates", to=[1, 1]))), ["version"]),
    ("unknown imputer", resummed(edit(INFERENCE, at("imputer", "name", to="no"))), ["version"]),
    ("unknown option", resummed(edit(INFERENCE, at("imputer", "x", to=1))), ["version"]),
    ("unknown kind", resummed(edit(META, at("modalities", 0, "kind", to="no"))), ["version"]),
    (
        "a class more",
        resummed(edit(META, at("target", "classes", to=["a", "b", "c"]))),
        ["tensors"],
    ),
    ("another size", resummed(edit(INFERENCE, at("backbone", "dim", to=32))), ["tensors"]),
    ("weights that are none", resummed(put(WEIGHTS, b"not weights")), ["version"]),
    ("weights that claim 1 EB", resummed(put(WEIGHTS, b"\xff" * 7 + b"\x0f{}")), ["version"]),
    (
        "tensor of another shape",
        tensors("backbone", lambda t, k: t.update({k: t[k][:1]})),
        ["shape"],
    ),
    (
        "tensor of another type",
        tensors("imputer", lambda t, k: t.update({k: t[k].double()})),
        ["64"],
    ),
    ("tensor of NaN", tensors("backbone", lambda t, k: t[k].fill_(np.nan)), ["NaN"]),
    ("tensor that is absent", tensors("imputer", lambda t, k: t.pop(k)), ["absent"]),
    (
        "statistics of infinity",
        tensors("statistics", lambda t, k: t[k].fill_(np.inf)),
        ["infinity"],
    ),
    ("statistics of nobody", tensors("statistics", nobody), ["borrowed_from"]),
    # What somebody who means harm would write; checksums fit.
    *(
        (
            f"file outside of the patient directory, {name}",
            resummed(edit(META, at("modalities", 0, "file", to=file))),
            [META, "modality t1", "inside the patient directory"],
        )
        for name, file in {
            "up": "../p001/t1.nii.gz",
            "later up": "scans/../../p001/t1.nii.gz",
            "absolute": "/p001/t1.nii.gz",
            "of a drive": "C:t1.nii.gz",
            "by backslashes": "..\\p001\\t1.nii.gz",
            "empty": "",
        }.items()
    ),
    (
        "shared table outside of the cohort",
        resummed(edit(META, at("modalities", 3, "rules", to={"shared": "../all.csv"}))),
        [META, "demographics"],
    ),
    *(
        (f"unknown key in {file}, {keys}", resummed(edit(file, at(*keys, "more", to=1))), ["more"])
        for file, keys in [
            (META, ()),
            (META, ("target",)),
            (META, ("modalities", 0)),
            (INFERENCE, ()),
            (SELECTORS, ()),
            (QUALITY, ()),
        ]
    ),
    ("unknown file", resummed(put("configs/more.json", b"{}")), ["more.json", "not part"]),
    ("description that is a pipe", pipe(META), [META]),
    ("checksums that are a pipe", pipe(SUMS), [SUMS, "regular"]),
    ("weights that are a pipe", pipe(WEIGHTS), [WEIGHTS, "regular"]),
    ("limits that are a pipe", pipe(QUALITY), [QUALITY, "regular"]),
    ("limits that are a device", all_of(instead(QUALITY), link(QUALITY, "/dev/null")), [QUALITY]),
    ("tensor of 1e30", tensors("backbone", lambda t, k: t[k].fill_(1e30)), ["no training"]),
    ("a single weight of -1e9", tensors("imputer", one_weight), ["no training"]),
    ("statistics of 1e30", tensors("statistics", lambda t, k: t[k].fill_(1e30)), ["no training"]),
    ("number of 1e300", resummed(edit(QUALITY, at("records", "t1", to=1e300))), ["number"]),
    *(
        (
            f"temperature of {t}",
            resummed(edit(INFERENCE, at("temperature", to=t))),
            ["temperature", "0.01 to 100"],
        )
        for t in (1e-6, 1e6, -1.0)
    ),
    *(
        (
            f"{part} of {option} {size}",
            resummed(edit(INFERENCE, at(part, option, to=size))),
            [says],
        )
        for part, option, size, says in [
            ("backbone", "layers", 10**9, "option"),
            ("backbone", "layers", 60_000, "larger than its weights"),
            ("backbone", "dim", 32_768, "larger than its weights"),
            ("imputer", "latent", 65_000, "larger than its weights"),
            ("imputer", "hidden", 2**50, "number"),
        ]
    ),
    *(
        (
            f"scan of {size} voxels",
            resummed(edit(META, at("modalities", 0, "shape", to=[1, *[size] * 3]))),
            [META, "size"],
        )
        for size in (10**6, 2**40, 0, -16, 16.0)
    ),
    (
        "scan larger than its weights",
        resummed(edit(META, at("modalities", 0, "shape", to=[1, 512, 512, 512]))),
        [],
    ),
    (
        "thousands of modalities",
        resummed(edit(META, more_modalities(2000))),
        [],
    ),
]


# The superuser may read everything.
ROWS = [case for case in PATIENT if not ("cannot be opened" in case[0] and ROOT)]


def slug(name):
    return "".join(c if c.isalnum() else "_" for c in name)


@contextmanager
def little_memory():
    """Let whatever asks for too much memory fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if not pages:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(capsys, *arguments):
    """Return the exit code, standard output and standard error of a command."""
    capsys.readouterr()
    with little_memory(), pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    for word in (SECRET, NUMBER, NUMBER.split(".")[0], "Traceback"):
        assert word not in printed.out + printed.err
    return stopped.value.code or 0, printed.out, printed.err


def complete(problem):
    """Whether a problem says where, what, what was expected or found, and what to do."""
    found = problem["expected"] or problem["got"]
    return all((problem["where"], problem["what"], found, problem["remedy"]))


def spoilt(cases):
    """The cases as parameters; those about permissions mean nothing to the superuser."""
    free = pytest.mark.skipif(ROOT, reason="the superuser may read everything")
    return [
        pytest.param(*case, id=case[0], marks=free if "cannot be opened" in case[0] else ())
        for case in cases
    ]


@pytest.fixture
def one_bundle(bundle, bundle_dir, monkeypatch):
    """The bundle's folder; it is loaded once, not once per case."""
    for module in ("dymo_med.bundle", "dymo_med.inference.check"):
        monkeypatch.setattr(f"{module}.load_bundle", lambda *_, **__: bundle)
    return bundle_dir


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """A cohort in which every patient but two is spoilt in another way."""
    root = tmp_path_factory.mktemp("ward")
    (root / "cohort.yaml").write_text(yaml.safe_dump(COHORT, sort_keys=False))
    rng = np.random.default_rng(0)
    write_patient(root / "whole", rng, True, ["t2"])
    records = ["good_1", *(slug(case[0]) for case in ROWS), "good_2"]
    for record in records:
        shutil.copytree(root / "whole", root / "patients" / record)
    for name, spoil, _ in ROWS:
        spoil(root / "patients" / slug(name))
    classes = [*("low", "high") * len(records)]
    (root / "labels.csv").write_text(
        "patient_id,grade\n" + "".join(f"{r},{c}\n" for r, c in zip(records, classes, strict=False))
    )
    (root / "splits.csv").write_text("patient_id,split\n" + "".join(f"{r},test\n" for r in records))
    return root


@pytest.mark.parametrize(("name", "spoil", "says"), spoilt(PATIENT))
def test_patient(one_bundle, ward, tmp_path, capsys, name, spoil, says):
    folder = ward / "patients" / slug(name)
    code, out, err = run(capsys, "check", folder, "--against", one_bundle, "--json")
    assert code == 3 and err == ""
    (problem,) = json.loads(out)["problems"]
    assert complete(problem), problem
    assert problem["where"].startswith(f"Patient {slug(name)}")
    code, printed, err = run(
        capsys, "predict", "-i", folder, "-b", one_bundle, "-o", tmp_path / "out", "-d", "cpu"
    )
    assert code == 3 and printed == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert not [word for word in says if word not in err], err
    assert [part for part in problem.values() if part not in err] == []


def test_all_patients_at_once(one_bundle, ward, tmp_path, capsys, plain):
    """Each spoilt record costs one row; the others are answered."""
    out = tmp_path / "out"
    code, _, err = run(
        capsys, "evaluate", "-b", one_bundle, "-c", ward, "-o", out, "--reports", 0, "-d", "cpu"
    )
    assert code == 3 and err.count("\n") == 1
    with (out / "failures.csv").open(encoding="utf-8") as stream:
        failures = list(csv.DictReader(stream))
    assert [f["record_id"] for f in failures] == [slug(case[0]) for case in ROWS]
    for failure, (_, _, says) in zip(failures, ROWS, strict=True):
        assert not [word for word in says if word not in failure["message"]]
    for path in out.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()
    with (out / "predictions.csv").open(encoding="utf-8") as stream:
        assert {row["record_id"] for row in csv.DictReader(stream)} == {"good_1", "good_2"}


def test_check_finds_all_of_them_in_one_pass(ward, capsys):
    code, out, _ = run(capsys, "check", ward, "--json")
    report = json.loads(out)
    assert code == report["exit_code"] == 3
    wheres = [p["where"] for p in report["problems"]]
    # A record of which nothing was observed may be in a cohort.
    assert len(wheres) == len(ROWS) - 1 and len(set(wheres)) == len(wheres)
    # What the quality gate refuses can be read, and counts as missing.
    refused = [r for r in report["records"] if "refuse" in r["states"].values()]
    worthless = ([T1, "finite"], [T1, "same value"])
    assert len(refused) == sum(says in worthless for *_, says in ROWS)
    assert sum(report["patterns"].values()) == 3 + len(refused)


def assert_refused(capsys, code, says, check, *others):
    """Assert that `check` finds one whole problem and other commands say the same of it."""
    found, out, err = run(capsys, *check, "--json")
    if err:  # what cannot even be told to be a cohort, a recipe or a bundle
        assert out == ""
    else:
        (problem,) = json.loads(out)["problems"]
        assert complete(problem), problem
    assert found == code, out + err
    for command in others:
        found, out, err = run(capsys, *command)
        assert found == code and out == "", out + err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not [word for word in says if word not in err], err


@pytest.mark.parametrize(("name", "spoil", "says"), spoilt(DESCRIPTION))
def test_description(one_bundle, cohort_dir, tmp_path, capsys, name, spoil, says):
    cohort, recipe, out = tmp_path / "cohort", tmp_path / "recipe.yaml", tmp_path / "out"
    cohort.mkdir()
    (cohort / "patients").symlink_to(cohort_dir / "patients")
    for file in (C, L, S):
        shutil.copy(cohort_dir / file, cohort)
    recipe.write_text(yaml.safe_dump(RECIPE))
    spoil(cohort)
    before = everything(tmp_path)
    assert_refused(
        capsys,
        2,
        says,
        ["check", cohort / C],
        ["train", recipe, "-c", cohort, "-o", out, "-d", "cpu", "-q"],
        ["evaluate", "-b", one_bundle, "-c", cohort, "-o", out, "-d", "cpu", "-q"],
    )
    assert everything(tmp_path) == before


@pytest.mark.parametrize(("name", "spoil", "says"), spoilt(RECIPE_CASES))
def test_recipe(cohort_dir, tmp_path, capsys, name, spoil, says):
    recipe = tmp_path / R
    recipe.write_text(yaml.safe_dump({**RECIPE, "seed": 0}))
    spoil(tmp_path)
    before = everything(tmp_path)
    out = tmp_path / "out"
    train = ["train", recipe, "-c", cohort_dir, "-o", out, "-d", "cpu", "-q"]
    assert_refused(capsys, 2, says, ["check", recipe], train)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("network", "option", "size"),
    [("imputer", "latent", 10**12), ("backbone", "projection", 10**18)],
)
def test_networks_beyond_all_memory(cohort_dir, tmp_path, capsys, network, option, size):
    recipe, out = tmp_path / R, tmp_path / "out"
    recipe.write_text(yaml.safe_dump({**RECIPE, network: {**RECIPE[network], option: size}}))
    code, printed, err = run(
        capsys, "train", recipe, "-c", cohort_dir, "-o", out, "-d", "cpu", "-q"
    )
    assert code == 2 and printed == "" and err.count("\n") == 1
    assert f"Recipe: {network}: the network is too large" in err
    assert not list(out.rglob("*.safetensors")) and not (out / "bundle").exists()


@pytest.mark.parametrize(("name", "spoil", "says"), spoilt(BUNDLE))
def test_bundle(bundle_dir, cohort_dir, tmp_path, capsys, name, spoil, says):
    bundle = shutil.copytree(bundle_dir, tmp_path / "bundle")
    spoil(bundle)
    before = everything(tmp_path)
    patient, out = cohort_dir / "patients" / "p000", tmp_path / "out"
    assert_refused(
        capsys,
        4,
        says,
        ["check", bundle],
        ["predict", "-i", patient, "-b", bundle, "-o", out, "-d", "cpu"],
        ["evaluate", "-b", bundle, "-c", cohort_dir, "-o", out, "-d", "cpu", "-q"],
    )
    assert everything(tmp_path) == before


def test_there_are_enough_cases():
    names = [case[0] for table in (PATIENT, DESCRIPTION, RECIPE_CASES, BUNDLE) for case in table]
    assert len(names) >= 60
    assert all(len({case[0] for case in table}) == len(table) for table in (PATIENT, BUNDLE))
