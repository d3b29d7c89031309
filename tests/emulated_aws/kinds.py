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
    create: Callable[[Account, Props], tuple[str, Props]]
    read: Callable[[Account, str], Props | None]
    delete: Callable[[Account, str, Props], None]
    updates: frozenset[str] = frozenset()
    update: Callable[[Account, str, Props], Props | None] = NOTHING
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


def there(ask: Callable[[Account, str], Any]) -> Callable[[Account, str], Props | None]:
    """Whether it is there; nothing else is read back."""

    @functools.wraps(ask)
    def read(account: Account, made_id: str) -> Props | None:
        try:
            return {} if ask(account, made_id) else None
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if "NotFound" in code or "NoSuch" in code or code == "404" or "NotFound" in type(error).__name__:
                return None
            raise

    return read


def ec2(
    name: str,
    inputs: str,
    create: Callable[[Any, Props], tuple[str, Props]],
    describe: tuple[str, str],
    delete: Callable[[Any, str, Props], Any],
    **more: Any,
) -> Kind:
    """A row of EC2. `describe`: the call and the argument that takes ids; tags can be changed."""
    call, argument = describe

    def read(account: Account, made_id: str) -> Any:
        answer = getattr(account.client("ec2"), call)(**{argument: [made_id]})
        return next(value for key, value in answer.items() if isinstance(value, list))

    def retag(account: Account, made_id: str, news: Props) -> None:
        account.client("ec2").create_tags(Resources=[made_id], Tags=tags(news))

    update = more.pop("update", None)

    def both(account: Account, made_id: str, news: Props) -> Props | None:
        retag(account, made_id, news)
        return update(account.client("ec2"), made_id, news) if update else None

    return Kind(
        token=f"aws:ec2/{name[0].lower()}{name[1:]}:{name}",
        inputs=frozenset(f"{inputs} tags".split()),
        create=lambda account, props: create(account.client("ec2"), props),
        read=there(read),
        delete=lambda account, made_id, props: delete(account.client("ec2"), made_id, props),
        updates=frozenset({"tags", *more.pop("updates", ())}),
        update=both,
        **more,
    )
