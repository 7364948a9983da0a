"""What `_fast/ucp.h` says of UCX's binary interface, held against the headers of the build that is installed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import asyncxfer

STRUCTURES = {  # ours, theirs, and the fields by both names
    "axf_ucp_param": (
        "ucp_request_param_t",
        {
            "mask": "op_attr_mask", "flags": "flags", "request": "request", "done": "cb", "datatype": "datatype",
            "arg": "user_data", "reply_buffer": "reply_buffer", "memory_type": "memory_type", "received": "recv_info",
            "memory": "memh",
        },
    ),
    "axf_ucp_map_param": (
        "ucp_mem_map_params_t",
        {
            "mask": "field_mask", "address": "address", "length": "length", "flags": "flags", "prot": "prot",
            "memory_type": "memory_type", "exported": "exported_memh_buffer",
        },
    ),
    "axf_ucp_am_param": ("ucp_am_recv_param_t", {"attributes": "recv_attr", "reply": "reply_ep"}),
    "axf_ucp_am_handler": (
        "ucp_am_handler_param_t", {"mask": "field_mask", "id": "id", "flags": "flags", "on_am": "cb", "arg": "arg"}
    ),
    "axf_ucp_lane": ("ucp_transport_entry_t", {"transport": "transport_name", "device": "device_name"}),
    "axf_ucp_ep_attr": (
        "ucp_ep_attr_t",
        {
            "mask": "field_mask", "name": "name", "addresses[0]": "local_sockaddr", "addresses[1]": "remote_sockaddr",
            "transports.lanes": "transports.entries", "transports.count": "transports.num_entries",
            "transports.lane_bytes": "transports.entry_size", "arg": "user_data",
        },
    ),
    "axf_ucp_perf_param": ("ucp_ep_evaluate_perf_param_t", {"mask": "field_mask", "nbytes": "message_size"}),
    "axf_ucp_perf": ("ucp_ep_evaluate_perf_attr_t", {"mask": "field_mask", "seconds": "estimated_time"}),
}  # fmt: skip
GROW = {"axf_ucp_param", "axf_ucp_ep_attr"}  # later versions add fields; of what UCX writes we ask only for ours
CONSTANTS = {
    "AXF_UCS_OK": "UCS_OK", "AXF_UCS_INPROGRESS": "UCS_INPROGRESS", "AXF_UCS_NO_MEMORY": "UCS_ERR_NO_MEMORY",
    "AXF_UCS_UNREACHABLE": "UCS_ERR_UNREACHABLE", "AXF_UCS_BUSY": "UCS_ERR_BUSY",
    "AXF_UCS_CANCELED": "UCS_ERR_CANCELED", "AXF_UCS_LAST": "UCS_ERR_LAST",
    "AXF_OP_CALLBACK": "UCP_OP_ATTR_FIELD_CALLBACK", "AXF_OP_ARG": "UCP_OP_ATTR_FIELD_USER_DATA",
    "AXF_OP_FLAGS": "UCP_OP_ATTR_FIELD_FLAGS", "AXF_OP_MEMORY": "UCP_OP_ATTR_FIELD_MEMH",
    "AXF_AM_REPLY": "UCP_AM_SEND_FLAG_REPLY", "AXF_AM_EAGER": "UCP_AM_SEND_FLAG_EAGER",
    "AXF_AM_COPY_HEAD": "UCP_AM_SEND_FLAG_COPY_HEADER", "AXF_AM_HAS_REPLY": "UCP_AM_RECV_ATTR_FIELD_REPLY_EP",
    "AXF_AM_IS_RNDV": "UCP_AM_RECV_ATTR_FLAG_RNDV", "AXF_CLOSE_FORCE": "UCP_EP_CLOSE_FLAG_FORCE",
    "AXF_MEMORY_HOST": "UCS_MEMORY_TYPE_HOST", "AXF_MEMORY_CUDA": "UCS_MEMORY_TYPE_CUDA",
    # What stands as a number where a mask is filled in.
    "(1 | 2 | 16)":
        "(UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE)",
    "(1 | 4 | 8)":
        "(UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG)",
    "8": "UCP_EP_ATTR_FIELD_TRANSPORTS",
    "(1)": "UCP_EP_PERF_PARAM_FIELD_MESSAGE_SIZE",
    "1": "UCP_EP_PERF_ATTR_FIELD_ESTIMATED_TIME",
}  # fmt: skip


def headers() -> Path:
    """Where UCX's are: of the wheel, or where `UCX_HEADERS` says."""
    wheel = importlib.util.find_spec("libucx")
    folders = [] if wheel is None else [Path(place, "include") for place in wheel.submodule_search_locations or []]
    if given := os.environ.get("UCX_HEADERS"):
        folders = [Path(given)]
    for folder in folders:
        if (folder / "ucp/api/ucp.h").is_file():
            return folder
    pytest.skip("no headers of UCX: no libucx wheel is installed")


def program() -> str:
    lines = ["#include <ucp/api/ucp.h>", '#include "ucp.h"', "#define SAME(a, b) _Static_assert((a) == (b), #a)"]
    for ours, (theirs, fields) in STRUCTURES.items():
        lines.append(f'_Static_assert(sizeof({ours}) {">=" if ours in GROW else "=="} sizeof({theirs}), "{ours}");')
        for mine, its in fields.items():
            lines.append(f"SAME(offsetof({ours}, {mine}), offsetof({theirs}, {its}));")
            lines.append(f"SAME(sizeof((({ours} *)0)->{mine}), sizeof((({theirs} *)0)->{its}));")
    lines += [f"SAME({mine}, {its});" for mine, its in CONSTANTS.items()]
    # A call through our pointer is a call of theirs if the types of all arguments have the same size and class.
    lines.append("#define CALLED(result, name, arguments) result (*check_##name) arguments = (void *)ucp_##name;")
    lines.append("AXF_UCP_FUNCTIONS(CALLED)")
    return "\n".join(lines) + "\n"


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no C compiler {command[0]!r}")
    return command


def compile_it(text: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "held.c"
    source.write_text(text)
    ours = Path(asyncxfer.__file__).parent / "_fast"
    command = [*compiler(), "-std=gnu11", "-c", str(source), "-o", str(tmp_path / "held.o"), "-iquote", str(ours)]
    return subprocess.run([*command, "-isystem", str(headers())], capture_output=True, text=True, check=False)


def test_our_words_mean_what_they_mean_in_ucx(tmp_path: Path) -> None:
    ran = compile_it(program(), tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("wrong", ["AXF_UCS_BUSY", "reply_buffer"])
def test_a_wrong_word_would_be_noticed(tmp_path: Path, wrong: str) -> None:
    text = program().replace(f"SAME({wrong}, ", f"SAME(1 + {wrong}, ")
    text = text.replace(f"offsetof(axf_ucp_param, {wrong})", "offsetof(axf_ucp_param, arg)")
    ran = compile_it(text, tmp_path)
    assert ran.returncode != 0
    assert "static assertion failed" in ran.stderr
