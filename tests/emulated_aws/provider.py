"""A Pulumi provider named aws over moto's server: the engine and the SDK are real, the account is emulated.

Started by the engine as `pulumi-resource-aws`. What it can make is in `tables.py`; a type that is not there is an
error, never a resource that does nothing. Each act is written to the journal, and faults are
taken from a file beside it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from botocore.exceptions import BotoCoreError, ClientError
from google.protobuf import empty_pb2, struct_pb2
from google.protobuf.json_format import MessageToDict
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc

from tests.emulated_aws.account import Account, EmulatedError
from tests.emulated_aws.kinds import Kind, is_absent
from tests.emulated_aws.looks import LOOKS
from tests.emulated_aws.tables import KINDS

VERSION = "7.51.1"
CHANGED, SAME = provider_pb2.DiffResponse.DIFF_SOME, provider_pb2.DiffResponse.DIFF_NONE


def plain(message: struct_pb2.Struct) -> dict[str, Any]:
    return {key: value for key, value in MessageToDict(message).items() if key != "__defaults"}


def struct(data: dict[str, Any]) -> struct_pb2.Struct:
    message = struct_pb2.Struct()
    message.update(data)
    return message


class Provider(provider_pb2_grpc.ResourceProviderServicer):
    def __init__(self, account: Account) -> None:
        self.account = account

    def GetPluginInfo(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's names
        return plugin_pb2.PluginInfo(version=VERSION)

    def CheckConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        return provider_pb2.DiffResponse(changes=SAME)

    def Configure(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.account.region = plain(request.args).get("region", "")
        return provider_pb2.ConfigureResponse(acceptSecrets=False, supportsPreview=False, acceptResources=False)

    def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802
        return empty_pb2.Empty()

    def Invoke(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.tok not in LOOKS:
            why = f"the emulated AWS has no {request.tok}; add it to tests/emulated_aws/looks.py"
            context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
        (known, look), args = LOOKS[request.tok], plain(request.args)
        if unknown := sorted(set(args) - known):
            why = f"the emulated AWS does not know {', '.join(unknown)} of {request.tok}; add it to tests/emulated_aws"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        with self.told(context):
            return provider_pb2.InvokeResponse(**{"return": struct(look(self.account, args))})

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self.kind(request.urn, context)
        unknown = sorted(set(plain(request.news)) - kind.inputs)
        if unknown:
            why = f"the emulated AWS does not know {', '.join(unknown)} of {kind.token}; add it to tests/emulated_aws"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        return provider_pb2.CheckResponse(inputs=request.news)

    def Diff(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self.kind(request.urn, context)
        olds, news = plain(request.old_inputs), plain(request.news)
        changed = sorted(key for key in {*olds, *news} if olds.get(key) != news.get(key))
        replaces = [key for key in changed if key not in kind.updates]
        return provider_pb2.DiffResponse(
            changes=CHANGED if changed else SAME,
            diffs=changed,
            replaces=replaces,
            deleteBeforeReplace=bool(replaces) and kind.named,
        )

    def Create(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind, inputs = self.kind(request.urn, context), plain(request.properties)
        with self.told(context):
            self.account.journal("create", request.urn)
            self.account.asked(request.urn, inputs)
            self.account.fault("create", kind.token, inputs)
            made_id = kind.create(self.account, inputs)
            self.account.journal("created", request.urn, made_id)
            self.account.fault("created", kind.token, inputs)
            outputs = kind.outputs(self.account, made_id, inputs)
            return provider_pb2.CreateResponse(id=made_id, properties=struct({**inputs, **outputs}))

    def Read(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self.kind(request.urn, context)
        with self.told(context):
            if not kind.is_there(self.account, request.id):
                return provider_pb2.ReadResponse(id="")
            made_id = kind.known_as(self.account, request.id)
            inputs = plain(request.inputs)
            if not inputs:
                # An import. What takes another call after the making may not have come to that.
                asked = self.account.asked(request.urn)
                inputs = {key: value for key, value in asked.items() if key not in kind.later}
            else:
                inputs = kind.seen(self.account, request.id, inputs)
            properties = {**plain(request.properties), **inputs, **kind.outputs(self.account, made_id, inputs)}
            return provider_pb2.ReadResponse(id=made_id, properties=struct(properties), inputs=struct(inputs))

    def Update(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind, news = self.kind(request.urn, context), plain(request.news)
        with self.told(context):
            self.account.journal("update", request.urn, request.id)
            self.account.fault("update", kind.token, news)
            self.account.asked(request.urn, news)
            kind.update(self.account, request.id, news)
            properties = {**plain(request.olds), **news, **kind.outputs(self.account, request.id, news)}
            return provider_pb2.UpdateResponse(properties=struct(properties))

    def Delete(self, request: Any, context: Any) -> Any:  # noqa: N802
        kind = self.kind(request.urn, context)
        with self.told(context):
            self.account.journal("delete", request.urn, request.id)
            self.account.fault("delete", kind.token, {})
            try:
                kind.delete(self.account, request.id, plain(request.properties))
            except ClientError as error:
                # What is gone already is deleted: a delete that was killed may have come that far.
                if not is_absent(error):
                    raise
            return empty_pb2.Empty()

    def kind(self, urn: str, context: Any) -> Kind:
        token = urn.split("::")[2].rsplit("$", 1)[-1]
        if token not in KINDS:
            why = f"the emulated AWS has no {token}; add it to tests/emulated_aws/tables.py"
            context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
        return KINDS[token]

    def told(self, context: Any) -> Telling:
        return Telling(context)


class Telling:
    """An error of the account is the engine's to show, as one line."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ClientError | BotoCoreError | EmulatedError | KeyError | TypeError | ValueError):
            self.context.abort(grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}")


def main() -> None:
    account = Account(os.environ["AWS_ENDPOINT_URL"], Path(os.environ["GPUYARD_EMULATED_AWS"]))
    server = grpc.server(
        ThreadPoolExecutor(max_workers=8), options=[("grpc.max_receive_message_length", 256 * 1024 * 1024)]
    )
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(Provider(account), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    # The engine that started this ends it; one that was killed leaves it with another parent.
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.2)
    sys.exit(json.dumps("the engine is gone"))


if __name__ == "__main__":
    main()
