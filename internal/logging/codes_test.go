// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestCodesAreDocumented wants every code that only lines have in docs/logs.md,
// with its MESSAGE_ID, and no other. Codes of decisions are in docs/decisions.md,
// which its own test generates.
func TestCodesAreDocumented(t *testing.T) {
	const doc = "../../docs/logs.md"
	b, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| `([^`]*)` \\|").FindAllStringSubmatch(string(b), -1) {
		documented[m[1]] = m[2]
	}
	used := map[string]bool{}
	err = filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "/testdata/") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) != 2 {
				return true
			}
			key := call.Args[0]
			if s, ok := key.(*ast.SelectorExpr); ok {
				key = s.Sel
			}
			id, _ := key.(*ast.Ident)
			lit, _ := call.Args[1].(*ast.BasicLit)
			if id != nil && id.Name == "KeyCode" && lit != nil {
				code, _ := strconv.Unquote(lit.Value)
				used[code] = true
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for code := range used {
		if documented[code] != MessageID(code) {
			t.Errorf("%s: the MESSAGE_ID of %s is %s, the table says %q", doc, code, MessageID(code), documented[code])
		}
	}
	for code := range documented {
		if !used[code] {
			t.Errorf("%s: no line has the code %s", doc, code)
		}
	}
	if mode := MessageID("MODE"); !strings.Contains(string(b), "MESSAGE_ID="+mode) {
		t.Errorf("%s: the MESSAGE_ID of MODE is %s", doc, mode)
	}
}
