// SPDX-License-Identifier: Apache-2.0

package enrich

import "github.com/aurorasoc/edr-sensor/sensor/event"

// cgroup is what the path of a control group says.
type cgroup struct {
	path      string
	container *event.Container // nil outside of containers
}

// cgroups remembers control groups, so that a path is taken apart once and a
// record that carries only an id finds it. Ids are those of the unified
// hierarchy; they are not reused while the host is up.
type cgroups struct {
	paths map[string]*cgroup
	ids   map[uint64]*cgroup
}

// cgroupMax bounds both maps; a full one is emptied, and fills again with what is
// in use.
const cgroupMax = 4096

func newCgroups() *cgroups {
	return &cgroups{paths: map[string]*cgroup{}, ids: map[uint64]*cgroup{}}
}

// seen returns the group at path, and remembers its id; that of a version 1
// group is the id of another one.
func (c *cgroups) seen(id uint64, path []byte, v1 bool) *cgroup {
	if !v1 {
		if g := c.ids[id]; g != nil && g.path == string(path) {
			return g
		}
	}
	g := c.paths[string(path)]
	if g == nil {
		g = c.path(string(path))
	}
	if !v1 {
		if len(c.ids) >= cgroupMax {
			clear(c.ids)
		}
		c.ids[id] = g
	}
	return g
}

// path returns the group at path.
func (c *cgroups) path(path string) *cgroup {
	g := c.paths[path]
	if g == nil {
		if len(c.paths) >= cgroupMax {
			clear(c.paths)
		}
		g = &cgroup{path: path, container: parseContainer(path)}
		c.paths[path] = g
	}
	return g
}
