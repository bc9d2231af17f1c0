"""Texts for the scripted model: what a model writes, with control tokens spelled out."""
import json

OPEN, END = "\n\n<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"


def parameter(name, value):
    if isinstance(value, str):
        return f'<｜DSML｜parameter name="{name}" string="true">{value}</｜DSML｜parameter>'
    return f'<｜DSML｜parameter name="{name}" string="false">{json.dumps(value)}</｜DSML｜parameter>'


def invoke(name, **arguments):
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameter(k, v) for k, v in arguments.items()) + "\n</｜DSML｜invoke>"


def calls(*invokes):
    """A well-formed block."""
    return OPEN + "\n".join(invokes) + END


def function(name, **properties):
    """A tool as a request declares it."""
    return {"type": "function", "function": {"name": name, "description": f"does {name}",
                                             "parameters": {"type": "object", "properties": properties}}}
