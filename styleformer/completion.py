"""Completion of `--flag=value` in bash, zsh and fish; click itself completes only `--flag value`."""

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
    """Completion in bash, which splits `--flag=value` into three words and replaces the last word."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        *args, incomplete = joined([*args, incomplete])
        return args, incomplete


class Zsh(ZshComplete):
    """Completion in zsh, which replaces the whole word `--flag=value`. Paths are completed after `--flag=`."""

    source_template = ZshComplete.source_template.replace("_path_files", "compset -P 1 '--*='; _path_files")

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        flag, equals, _ = incomplete.partition("=")
        items = super().get_completions(args, incomplete)
        for item in items if equals and flag.startswith("--") else ():
            if item.type == "plain":
                item.value = f"{flag}={item.value}"
        return items


class Fish(FishComplete):
    """Completion in fish, which replaces the whole word `--flag=value`."""

    source_template = FISH


def joined(words: list[str]) -> list[str]:
    """Join every standalone `=` with the words before and after it."""
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
    """Register these classes with click."""
    for complete in (Bash, Zsh, Fish):
        add_completion_class(complete)
