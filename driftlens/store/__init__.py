"""The file format: recordings (HDF5, schema 1), run manifests, atomic writes, locks and verification."""

from driftlens.store.atomic import atomic_file, atomic_folder, write_bytes, write_json
from driftlens.store.lock import RunLock
from driftlens.store.manifest import FileEntry, Manifest, leftovers, sha256_file
from driftlens.store.reader import Group, Recording, ReferenceGroup, open_recording
from driftlens.store.schema import Grams, Problem, SiteInfo, estimate_bytes, group_sites
from driftlens.store.thin import gram_matrices, thin_recording
from driftlens.store.verify import verify_recording
from driftlens.store.writer import RecordingWriter

__all__ = [
    "FileEntry",
    "Grams",
    "Group",
    "Manifest",
    "Problem",
    "Recording",
    "RecordingWriter",
    "ReferenceGroup",
    "RunLock",
    "SiteInfo",
    "atomic_file",
    "atomic_folder",
    "estimate_bytes",
    "gram_matrices",
    "group_sites",
    "leftovers",
    "open_recording",
    "sha256_file",
    "thin_recording",
    "verify_recording",
    "write_bytes",
    "write_json",
]
