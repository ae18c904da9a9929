// SPDX-License-Identifier: Apache-2.0

package event

import (
	"bytes"
	"flag"
	"fmt"
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

	"github.com/aurorasoc/edr-sensor/internal/logging"
)

var update = flag.Bool("update", false, "write docs/decisions.md")

const decisionsFile = "../../docs/decisions.md"

// TestDecisionsDocs compares docs/decisions.md with the table.
func TestDecisionsDocs(t *testing.T) {
	intro, err := os.ReadFile("testdata/decisions-intro.md")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	b.Write(intro)
	fmt.Fprint(&b, "\n## All decisions\n\n| code | activity | stream |\n|---|---|---|\n")
	for _, d := range DecisionTable() {
		fmt.Fprintf(&b, "| [`%s`](#%s) | %s | `decisions:%s` |\n", d.Code, strings.ToLower(d.Code), d.Name, d.Stream)
	}
	for _, d := range DecisionTable() {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n**What to do:** %s\n\nIn the journal: `MESSAGE_ID=%s`\n", d.Code, d.Meaning, d.Remedy, logging.MessageID(d.Code))
	}
	if *update {
		if err := os.WriteFile(decisionsFile, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(decisionsFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Errorf("%s is not what the table says: run make generate", decisionsFile)
	}
}

func TestDecisionTableIsWellFormed(t *testing.T) {
	code := regexp.MustCompile(`^[A-Z]+(_[A-Z]+)*$`)
	seen := map[string]bool{}
	for _, d := range DecisionTable() {
		if !code.MatchString(d.Code) || seen[d.Code] {
			t.Errorf("code %q is malformed or there twice", d.Code)
		}
		seen[d.Code] = true
		for _, text := range []string{d.Meaning, d.Remedy} {
			if !strings.HasSuffix(text, ".") || strings.Contains(text, "\n") {
				t.Errorf("%s: %q is no sentence", d.Code, text)
			}
		}
		if d.Name == "" {
			t.Errorf("%s has no activity", d.Code)
		}
		if got, ok := Explain(d.Code); !ok || got != d {
			t.Errorf("%s is not explained", d.Code)
		}
	}
	if _, ok := Explain("NO_SUCH"); ok {
		t.Error("what is not there is explained")
	}
}

// TestEveryDecisionIsInTheTable looks for the codes of decisions in all sources: one
// that the table does not have would be a record that nobody can look up.
func TestEveryDecisionIsInTheTable(t *testing.T) {
	used := map[string]string{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && len(d.Name()) > 2 {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			for _, c := range codes(n) {
				used[c] = path
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(used) < 10 {
		t.Errorf("found the codes %v only", used)
	}
	for code, path := range used {
		if _, ok := Explain(code); !ok {
			t.Errorf("%s: decision %s is not in DecisionTable (sensor/event/decision.go)", path, code)
		}
	}
}

// codes are the literals that n sets a field named Code to.
func codes(n ast.Node) (out []string) {
	add := func(name, value ast.Expr) {
		id, _ := name.(*ast.Ident)
		if sel, ok := name.(*ast.SelectorExpr); ok {
			id = sel.Sel
		}
		lit, ok := value.(*ast.BasicLit)
		if id == nil || id.Name != "Code" || !ok || lit.Kind != token.STRING {
			return
		}
		if s, err := strconv.Unquote(lit.Value); err == nil {
			out = append(out, s)
		}
	}
	switch n := n.(type) {
	case *ast.KeyValueExpr:
		add(n.Key, n.Value)
	case *ast.AssignStmt:
		if len(n.Lhs) == len(n.Rhs) {
			for i := range n.Lhs {
				add(n.Lhs[i], n.Rhs[i])
			}
		}
	}
	return out
}
