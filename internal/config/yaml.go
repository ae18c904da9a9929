// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// maxFile bounds a configuration file, because the parser needs quadratic time
// for some input. It is ten times what the documented default file has.
const maxFile = 64 * KiB

// shape is what a YAML value looks like before anything knows its key.
type shape uint8

const (
	shapeNull shape = iota
	shapeString
	shapeNumber
	shapeBool
	shapeMap
	shapeList
	shapeText // from the environment: any scalar
)

func (s shape) String() string {
	return [...]string{"is empty", "is a string", "is a number", "is a boolean", "is a section", "is a list", "is text"}[s]
}

// node is a YAML value with its position; the rest of the package sees only this.
type node struct {
	pos   Position
	shape shape
	text  string // of a scalar, as typed but for quotes and escapes
	pairs []pair // of a map, in order, duplicates included
	items []node // of a list
}

type pair struct {
	key string
	pos Position
	val node
}

// parseYAML returns the root of the only document in data. An empty file is an
// empty map.
func parseYAML(name string, data []byte) (root node, err error) {
	at := func(line, column int, what, remedy string) error {
		return &Problem{Position: Position{name, line, column}, What: what, Remedy: remedy}
	}
	if len(data) > maxFile {
		return node{}, at(1, 1, fmt.Sprintf("is larger than %d KiB", maxFile/KiB), "is this the right file?")
	}
	// The parser has panicked on hostile input before; a configuration must not
	// be able to end the process with a stack trace.
	defer func() {
		if r := recover(); r != nil {
			err = at(1, 1, fmt.Sprintf("cannot be parsed: %v", r), "check the YAML syntax")
		}
	}()
	if depth(data) > maxDepth {
		return node{}, at(1, 1, fmt.Sprintf("nests more than %d values", maxDepth), "check the YAML syntax")
	}
	file, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) && ye.GetToken() != nil {
			p := ye.GetToken().Position
			return node{}, at(p.Line, p.Column, "syntax error: "+ye.GetMessage(), "")
		}
		return node{}, at(1, 1, "syntax error: "+err.Error(), "")
	}
	c := converter{name: name}
	root = node{pos: Position{name, 1, 1}, shape: shapeMap}
	for i, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if i > 0 {
			p := doc.Body.GetToken().Position
			return node{}, at(p.Line, p.Column, "starts a second document", "keep one document per file, or use a drop-in in conf.d")
		}
		root = c.convert(doc.Body)
	}
	return root, errors.Join(c.errs...)
}

// maxDepth bounds nested collections: the parser recurses for each, and a stack
// that overflows cannot be recovered. No key of ours is deeper than three.
const maxDepth = 64

// depth is an upper bound of how deep brackets, and dashes on one line, nest.
func depth(data []byte) int {
	deepest, brackets, dashes := 0, 0, 0
	for i, b := range data {
		switch b {
		case '[', '{':
			brackets++
		case ']', '}':
			brackets = max(0, brackets-1)
		case '\n':
			dashes = 0
		case ' ':
			if i > 0 && data[i-1] == '-' {
				dashes++
			}
		}
		deepest = max(deepest, brackets+dashes)
	}
	return deepest
}

type converter struct {
	name string
	errs []error
}

func (c *converter) position(n ast.Node) Position {
	tk := n.GetToken()
	if tk == nil || tk.Position == nil {
		return Position{c.name, 1, 1}
	}
	return Position{c.name, tk.Position.Line, tk.Position.Column}
}

func (c *converter) convert(n ast.Node) node {
	out := node{pos: c.position(n)}
	switch n := n.(type) {
	case *ast.NullNode:
	case *ast.StringNode:
		out.shape, out.text = shapeString, n.Value
	case *ast.LiteralNode:
		out.shape, out.text = shapeString, n.Value.Value
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		out.shape, out.text = shapeNumber, n.GetToken().Value
	case *ast.BoolNode:
		out.shape, out.text = shapeBool, n.GetToken().Value
	case *ast.SequenceNode:
		out.shape = shapeList
		for _, v := range n.Values {
			out.items = append(out.items, c.convert(v))
		}
	case ast.MapNode:
		out.shape = shapeMap
		for it := n.MapRange(); it.Next(); {
			out.pairs = append(out.pairs, c.pair(it.KeyValue()))
		}
	default:
		// Anchors, aliases, merge keys and tags: ten keys do not need them, and
		// they are how a small file becomes a large one.
		c.errs = append(c.errs, &Problem{Position: out.pos, What: "uses YAML's " + n.Type().String(), Remedy: "write the value itself"})
	}
	return out
}

func (c *converter) pair(kv *ast.MappingValueNode) pair {
	p := pair{pos: c.position(kv.Key)}
	if key, ok := kv.Key.(ast.ScalarNode); ok && key.GetToken() != nil {
		p.key = key.GetToken().Value
	} else {
		c.errs = append(c.errs, &Problem{Position: p.pos, What: "uses YAML's " + kv.Key.Type().String() + " as a key", Remedy: "write the key itself"})
	}
	if kv.Value != nil {
		p.val = c.convert(kv.Value)
	}
	if p.val.shape == shapeNull {
		p.val.pos = p.pos // nothing stands there; point at the key
	}
	return p
}
