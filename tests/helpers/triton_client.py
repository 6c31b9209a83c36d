"""Runs in the server's environment, which has tritonclient: one gRPC stream, told by stdin, answered on stdout.

The first line is {"address", "model", "batch", "id", "fields"}; then a line "cancel" or "stop" ends the stream. Every
reply is a line: {"sent": true} first, then {"outputs": {name: [...]}} or {"error": "..."}, at last {"final": true}.
"""

import json
import sys
import threading
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient

KINDS: dict[type, tuple[str, Any]] = {
    bytes: ("BYTES", object),
    bool: ("BOOL", bool),
    float: ("FP32", np.float32),
    int: ("INT32", np.int32),
}
LOCK = threading.Lock()


def main() -> None:
    """One stream."""
    request = json.loads(sys.stdin.readline())
    client = grpcclient.InferenceServerClient(request["address"])
    client.start_stream(on_reply)
    inputs = [tensor(name, value, request["batch"]) for name, value in request["fields"].items()]
    client.async_stream_infer(request["model"], inputs, request_id=request["id"], enable_empty_final_response=True)
    tell({"sent": True})
    client.stop_stream(cancel_requests=sys.stdin.readline().strip() == "cancel")
    client.close()


def on_reply(result: Any, error: Any) -> None:
    """A response of the server, or its refusal."""
    if error is not None:
        tell({"error": error.message()})
        return
    response = result.get_response()
    if response.outputs:
        tell({"outputs": {output.name: plain(result.as_numpy(output.name)) for output in response.outputs}})
    if response.parameters["triton_final_response"].bool_param:
        tell({"final": True})


def tensor(name: str, value: Any, batch: bool) -> Any:
    """An input; text as str, other bytes as {"hex": ...}."""
    values = [one_value(one) for one in (value if isinstance(value, list) else [value])]
    kind, dtype = KINDS[type(values[0])]
    array = np.array(values, dtype=dtype)
    array = array[None] if batch else array
    made = grpcclient.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def one_value(value: Any) -> Any:
    """A value as numpy takes it."""
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return value.encode() if isinstance(value, str) else value


def plain(array: Any) -> list[Any]:
    """An output as JSON can hold it."""
    return [one.decode() if isinstance(one, bytes) else one for one in array.ravel().tolist()]


def tell(document: dict[str, Any]) -> None:
    """One line of JSON."""
    with LOCK:
        print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
