"""What a row of the emulated AWS is, and what rows have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from tests.emulated_aws.account import Account

Props = dict[str, Any]
NOTHING: Callable[..., None] = lambda *_: None  # noqa: E731


@dataclass(frozen=True)
class Kind:
    """How one type of resource is made, read, changed and deleted."""

    token: str
    inputs: frozenset[str]
    create: Callable[[Account, Props], str]
    """Its id."""
    is_there: Callable[[Account, str], bool]
    delete: Callable[[Account, str, Props], None]
    outputs: Callable[[Account, str, Props], Props] = lambda *_: {}
    """What the account tells of it beside what was asked for."""
    updates: frozenset[str] = frozenset()
    update: Callable[[Account, str, Props], None] = NOTHING
    seen: Callable[[Account, str, Props], Props] = lambda _, __, inputs: inputs
    """What was asked for, as the account has it now."""
    later: frozenset[str] = frozenset()
    """Inputs that take another call once it is there: a create that was broken off may have left it without them."""
    known_as: Callable[[Account, str], str] = lambda _, made_id: made_id
    """The id of what is called otherwise where it is imported."""
    named: bool = False
    """Two of one name cannot be at once."""
    lacks: str = ""


def tags(props: Props) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in props.get("tags", {}).items()]


def specified(kind: str, props: Props) -> list[dict[str, Any]]:
    return [{"ResourceType": kind, "Tags": tags(props)}] if props.get("tags") else []


def pascal(value: Any) -> Any:
    """Keys as the API writes them; text that stands for a truth, and whole numbers, as what they are."""
    match value:
        case dict():
            return {key[0].upper() + key[1:]: pascal(item) for key, item in value.items()}
        case list():
            return [pascal(item) for item in value]
        case float() if value.is_integer():
            return int(value)
        case "true" | "false":
            return value == "true"
        case _:
            return value


def there(ask: Callable[[Account, str], Any]) -> Callable[[Account, str], bool]:
    """Whether it is there, by an answer that is empty or says that it is not."""

    @functools.wraps(ask)
    def look(account: Account, made_id: str) -> bool:
        try:
            return bool(ask(account, made_id))
        except ClientError as error:
            if is_absent(error):
                return False
            raise

    return look


def is_absent(error: ClientError) -> bool:
    code = error.response["Error"]["Code"]
    return "NotFound" in code or "NoSuch" in code or code == "404" or "NotFound" in type(error).__name__


def ec2(
    name: str,
    inputs: str,
    create: Callable[[Any, Props], str],
    describe: tuple[str, str],
    delete: Callable[[Any, str, Props], Any],
    outputs: Callable[[Any, str, Props], Props] = lambda *_: {},
    update: Callable[[Any, str, Props], Any] = NOTHING,
    **more: Any,
) -> Kind:
    """A row of EC2. `describe`: the call and the argument that takes ids; tags can be changed."""
    call, argument = describe

    def look(account: Account, made_id: str) -> Any:
        answer = getattr(account.client("ec2"), call)(**{argument: [made_id]})
        return [each for each in next(v for v in answer.values() if isinstance(v, list)) if alive(each)]

    def both(account: Account, made_id: str, news: Props) -> None:
        account.client("ec2").create_tags(Resources=[made_id], Tags=tags(news))
        update(account.client("ec2"), made_id, news)

    return Kind(
        token=f"aws:ec2/{name[0].lower()}{name[1:]}:{name}",
        inputs=frozenset(f"{inputs} tags".split()),
        create=lambda account, props: create(account.client("ec2"), props),
        is_there=there(look),
        delete=lambda account, made_id, props: delete(account.client("ec2"), made_id, props),
        outputs=lambda account, made_id, props: outputs(account.client("ec2"), made_id, props),
        updates=frozenset({"tags", *more.get("later", ()), *more.pop("updates", ())}),
        update=both,
        later=frozenset(more.pop("later", ())),
        **more,
    )


def alive(each: Props) -> bool:
    """Whether what EC2 still lists is there: some things are told for an hour after they are gone."""
    state = each.get("State")
    return (state["Name"] if isinstance(state, dict) else state) not in ("deleted", "terminated", "shutting-down")
