"""FoV unification of 3D-box rows: the prompt and the image size of one virtual camera (arXiv 2511.05491)."""

from __future__ import annotations

from fastvst.data.image_modes import AS_DISPLAYED, ImageRules
from fastvst.data.images import image_size
from fastvst.data.sample import Message
from fastvst.spatial.prompts import to_fov_prompt, to_fov_prompts


def unify_fov_messages(
    messages: list[Message], base_width: int, max_source_pixels: int, rules: ImageRules = AS_DISPLAYED
) -> tuple[list[Message], str]:
    """Rewrite the camera line of a 3D-box prompt and the image sizes for the virtual camera.

    Args:
        messages: role and parts as in `Sample.messages`; they are not changed.
        base_width: width of the virtual camera's image in pixels.
        max_source_pixels: larger images are rejected, as in `image_size`.
        rules: how images are shown; the sizes are those of the displayed images.

    Returns:
        The new messages and "fov_unified", or the given messages and "fov_unchanged:<reason>".
    """
    images = [
        (m, p)
        for m, message in enumerate(messages)
        for p, part in enumerate(message["content"])
        if part["type"] == "image"
    ]
    if not images:
        return messages, "fov_unchanged:0_images"
    sizes = [
        image_size(messages[m]["content"][p]["image"], max_source_pixels=max_source_pixels, rules=rules)
        for m, p in images
    ]
    changed = [{**message, "content": [dict(part) for part in message["content"]]} for message in messages]
    texts = [
        part
        for message in changed
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text"
    ]
    for part in texts:
        text, new_sizes = _fov_prompt(part["text"], sizes, base_width)
        if text != part["text"]:
            part["text"] = text
            for (m, p), (width, height) in zip(images, new_sizes, strict=True):
                changed[m]["content"][p] |= {"resized_width": width, "resized_height": height}
            return changed, "fov_unified"
    if len(images) != 1:
        return messages, f"fov_unchanged:{len(images)}_images"
    return messages, "fov_unchanged:no_camera_line"


def _fov_prompt(text: str, sizes: list[tuple[int, int]], base_width: int) -> tuple[str, list[tuple[int, int]]]:
    """The prompt for the virtual camera and the (width, height) of every image; `text` itself without a camera line."""
    if len(sizes) == 1:
        prompt, size = to_fov_prompt(text, *sizes[0], base_width=base_width)
        return prompt, [size]
    return to_fov_prompts(text, sizes, base_width=base_width)  # one camera line for each image
