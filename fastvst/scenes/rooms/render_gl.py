"""OpenGL backend: one pass writes colour, planar depth and object ids; `load` fills the shadow map of the room."""

from __future__ import annotations

import moderngl
import numpy as np

from fastvst.scenes.rooms.geometry import Geometry
from fastvst.scenes.rooms.render_base import FAR, NEAR
from fastvst.spatial.camera import Camera

SHADOW_SIZE = 768
SHADOW_REACH = 3.0  # tangent of the widest angle from straight down that the shadow map covers (71 degrees)

_VERTEX_TYPE = np.dtype(
    [("in_position", "f4", 3), ("in_uv", "f4", 2), ("in_rgba", "f4", 4), ("in_layer", "i4"), ("in_id", "i4")]
)
_VERTEX = """
#version 330
in vec3 in_position; in vec2 in_uv; in vec4 in_rgba; in int in_layer; in int in_id;
uniform mat3 rotation; uniform vec3 translation; uniform vec4 lens; uniform vec2 clip;
out vec3 world; out float depth; out vec2 uv; out vec4 rgba; flat out int layer; flat out int object;
void main() {
    vec3 c = rotation * in_position + translation;
    world = in_position; depth = c.z; uv = in_uv; rgba = in_rgba; layer = in_layer; object = in_id;
    gl_Position = vec4(lens.x * c.x + lens.z * c.z, lens.y * c.y + lens.w * c.z, clip.x * c.z + clip.y, c.z);
}
"""

_FRAGMENT = """
#version 330
in vec3 world; in float depth; in vec2 uv; in vec4 rgba; flat in int layer; flat in int object;
uniform vec3 eye; uniform vec3 light; uniform float ambient; uniform float lamp; uniform float reach;
uniform sampler2DArray textures; uniform sampler2D shadow;
layout(location = 0) out vec4 out_rgb; layout(location = 1) out float out_depth; layout(location = 2) out int out_id;
void main() {
    vec3 n = normalize(cross(dFdx(world), dFdy(world)));
    vec3 v = normalize(eye - world);
    if (dot(n, v) < 0.0) n = -n;
    vec3 texel = texture(textures, vec3(uv, max(layer, 0))).rgb;
    vec3 base = layer >= 0 ? rgba.rgb * texel : rgba.rgb;
    vec3 l = light - world;
    float d2 = dot(l, l);
    float lit = 0.0;
    vec3 s = l - 0.035 * n;  // look up from a little above the surface: no self-shadow on steep walls
    if (s.z > 0.05) {
        vec2 p = -s.xy / (s.z * reach);
        vec2 q = p * 0.5 + 0.5;
        float bias = 0.015 + 0.01 * dot(s.xy, s.xy) / (s.z * s.z);
        vec2 step = vec2(0.7) / vec2(textureSize(shadow, 0));
        for (int i = -1; i <= 1; i += 2)
            for (int j = -1; j <= 1; j += 2)
                lit += texture(shadow, q + step * vec2(i, j)).r < s.z - bias ? 0.0 : 0.25;
        if (max(abs(p.x), abs(p.y)) > 0.99) lit = 1.0;
    }
    float diffuse = max(dot(n, l) * inversesqrt(d2), 0.0) * lit * 3.4 / (2.2 + d2 * 0.35);
    float sky = ambient * (0.78 + 0.22 * n.z) + 0.14 * dot(n, v);
    vec3 colour = base * (mix(sky + lamp * diffuse, 1.1, rgba.a));
    out_rgb = vec4(min(colour, 1.0), 1.0); out_depth = depth; out_id = object;
}
"""

_SHADOW_VERTEX = """
#version 330
in vec3 in_position; uniform vec3 light; uniform float reach; out float drop;
void main() {
    vec3 d = in_position - light; drop = -d.z;
    gl_Position = vec4(d.xy / reach, drop * 1.001 - 0.1, drop);
}
"""

_SHADOW_FRAGMENT = """
#version 330
in float drop; out float value; void main() { value = drop; }
"""


class GLRenderer:
    """A `Renderer` with an OpenGL context of its own. moderngl raises a plain Exception if EGL is missing."""

    name = "gl"

    def __init__(self) -> None:
        self.context = moderngl.create_context(standalone=True, backend="egl")  # type: ignore[arg-type]
        self.device = self.context.info["GL_RENDERER"]
        self.context.enable(moderngl.DEPTH_TEST)
        self.program = self.context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)
        self.shadow_program = self.context.program(vertex_shader=_SHADOW_VERTEX, fragment_shader=_SHADOW_FRAGMENT)
        self.shadow = self.context.texture((SHADOW_SIZE, SHADOW_SIZE), 1, dtype="f4")
        self.shadow.filter = (moderngl.NEAREST, moderngl.NEAREST)
        self.shadow.repeat_x = self.shadow.repeat_y = False
        self.shadow_target = self.context.framebuffer(
            [self.shadow], self.context.depth_renderbuffer((SHADOW_SIZE, SHADOW_SIZE))
        )
        self.targets: dict[tuple[int, int], moderngl.Framebuffer] = {}
        self.textures: moderngl.TextureArray | None = None
        self.buffers: list = []
        self.eye_array: moderngl.VertexArray | None = None

    def load(self, geometry: Geometry) -> None:
        with self.context:  # another renderer in this process may be current
            self._load(geometry)

    def _load(self, g: Geometry) -> None:
        for buffer in self.buffers:
            buffer.release()
        vertex = np.zeros(len(g.positions), dtype=_VERTEX_TYPE)
        vertex["in_position"] = g.positions
        vertex["in_uv"] = g.uv
        vertex["in_rgba"] = g.rgba
        vertex["in_layer"] = g.layer
        vertex["in_id"] = g.ids
        data = self.context.buffer(vertex.tobytes())
        index = self.context.buffer(g.triangles.astype(np.int32).tobytes())
        fields = (data, "3f 2f 4f 1i 1i", *(_VERTEX_TYPE.names or ()))
        self.eye_array = self.context.vertex_array(self.program, [fields], index)
        shadow_array = self.context.vertex_array(self.shadow_program, [(data, "3f 32x", "in_position")], index)
        self.buffers = [self.eye_array, shadow_array, data, index]
        self._upload_textures(g.textures)
        light = tuple(float(x) for x in g.light)
        self.program["light"] = light
        self.program["ambient"] = g.ambient
        self.program["lamp"] = g.lamp
        self.program["reach"] = SHADOW_REACH
        self.program["textures"] = 0
        self.program["shadow"] = 1
        self.shadow_program["light"] = light
        self.shadow_program["reach"] = SHADOW_REACH
        self.shadow_target.use()
        self.shadow_target.clear(FAR)
        shadow_array.render()

    def _upload_textures(self, textures: np.ndarray) -> None:
        """Replace the last two layers (floor and walls of the room); the layers of the furniture stay on the device."""
        count, height, width, _ = textures.shape
        if self.textures is None or self.textures.layers != count:
            self.textures = self.context.texture_array((width, height, count), 3, textures[:, ::-1].tobytes())
            self.textures.repeat_x = self.textures.repeat_y = True
        else:
            self.textures.write(textures[-2:, ::-1].tobytes(), viewport=(0, 0, count - 2, width, height, 2))
        self.textures.build_mipmaps()
        self.textures.filter = (moderngl.LINEAR_MIPMAP_LINEAR, moderngl.LINEAR)

    def _target(self, width: int, height: int) -> moderngl.Framebuffer:
        if (width, height) not in self.targets:
            size = (width, height)
            self.targets[size] = self.context.framebuffer(
                [
                    self.context.texture(size, 4),
                    self.context.texture(size, 1, dtype="f4"),
                    self.context.texture(size, 1, dtype="i4"),
                ],
                self.context.depth_renderbuffer(size),
            )
        return self.targets[width, height]

    def draw(self, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.eye_array is None or self.textures is None:
            raise RuntimeError("GLRenderer.draw: load a geometry first")
        with self.context:
            return self._draw(camera, self.eye_array, self.textures)

    def _draw(
        self, camera: Camera, triangles: moderngl.VertexArray, textures: moderngl.TextureArray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width = camera.width
        height = camera.height
        target = self._target(width, height)
        target.use()
        target.clear()
        # v grows downwards, so the first row of the frame buffer is the top of the image and needs no flip.
        self.program["lens"] = (
            2 * camera.fx / width,
            2 * camera.fy / height,
            2 * camera.cx / width - 1,
            2 * camera.cy / height - 1,
        )
        self.program["clip"] = ((FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR))
        self.program["rotation"] = tuple(camera.rotation.T.ravel())  # GL stores matrices by columns
        self.program["translation"] = tuple(camera.translation)
        self.program["eye"] = tuple(camera.position)
        textures.use(0)
        self.shadow.use(1)
        triangles.render()
        rgb = np.frombuffer(target.read(components=3, attachment=0, alignment=1), np.uint8)
        depth = np.frombuffer(target.read(components=1, attachment=1, dtype="f4"), np.float32)
        ids = np.frombuffer(target.read(components=1, attachment=2, dtype="i4"), np.int32)
        return rgb.reshape(height, width, 3), depth.reshape(height, width), ids.reshape(height, width)
