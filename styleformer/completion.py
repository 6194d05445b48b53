"""Completion of `--flag=value` in bash, zsh and fish, which click completes as `--flag value` only."""

from __future__ import annotations

from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete, add_completion_class

FISH = """\
function %(complete_func)s
    set -l words (commandline -cp)
    set -l word (commandline -t)
    set -l flag (string match --regex -- '^--[^=]+=' $word)
    for line in (env %(complete_var)s=fish_complete COMP_WORDS=$words COMP_CWORD=$word %(prog_name)s)
        set -l item (string split --max 1 "," $line)
        switch $item[1]
            case dir
                for path in (__fish_complete_directories $item[2])
                    echo "$flag$path"
                end
            case file
                for path in (__fish_complete_path $item[2])
                    echo "$flag$path"
                end
            case plain
                echo "$flag$item[2]"
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class Bash(BashComplete):
    """Bash, which splits `--flag=value` into three words and replaces the last one."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        *args, incomplete = joined([*args, incomplete])
        return args, incomplete


class Zsh(ZshComplete):
    """Zsh, in which a completion is the whole word: `--flag=` and the value. Paths are completed behind `--flag=`."""

    source_template = ZshComplete.source_template.replace("_path_files", "compset -P 1 '--*='; _path_files")

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        flag, equals, _ = incomplete.partition("=")
        items = super().get_completions(args, incomplete)
        for item in items if equals and flag.startswith("--") else ():
            if item.type == "plain":
                item.value = f"{flag}={item.value}"
        return items


class Fish(FishComplete):
    """Fish, in which a completion is the whole word: `--flag=` and the value."""

    source_template = FISH


def joined(words: list[str]) -> list[str]:
    """Return words in which an `=` of its own is joined to the words beside it."""
    result: list[str] = []
    is_open = False
    for word in words:
        if result and (word == "=" or is_open):
            result[-1] += word
        else:
            result.append(word)
        is_open = word == "="
    return result


def register() -> None:
    """Make these classes those of click for their shells."""
    for complete in (Bash, Zsh, Fish):
        add_completion_class(complete)
