// SPDX-License-Identifier: Apache-2.0

package logging

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestContextReachesEveryLine holds the sources against the rules under which no
// log line can lack what the boundary has bound: a logger comes out of the
// caller's context where the line is written, and is made and kept nowhere else.
func TestContextReachesEveryLine(t *testing.T) {
	const root = "../.."
	// What may start a context, or make the one logger.
	exempt := map[string][]string{
		"cmd/edr-sensor/main.go": {"context.Background", "os.Stdout", "os.Stderr"},
		"cmd/edr-sensor/run.go":  {"logging.New"},
		"packaging/sbom/main.go": {"os.Stderr"}, // a tool of the build
	}
	checked := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(path, root+"/")
		if d.IsDir() {
			switch name := d.Name(); {
			case strings.HasPrefix(name, ".") && path != root, name == "testdata", rel == "bench", // a module of its own
				rel == "internal/logging", strings.HasSuffix(name, "test") && name != "vmtest": // redistest, ocsftest: help for tests
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		checked++
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, f := range findings(file) {
			if !slices.ContainsFunc(exempt[rel], func(what string) bool { return strings.HasPrefix(f.what, what+" ") }) {
				t.Errorf("%s:%d: %s", rel, fset.Position(f.at).Line, f.what)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if checked < 50 {
		t.Errorf("only %d files were checked", checked)
	}
}

// TestStaticCheckFindsDefects is its negative control.
func TestStaticCheckFindsDefects(t *testing.T) {
	const path = "testdata/defects.go"
	src, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]string{}
	for _, f := range findings(file) {
		found[fset.Position(f.at).Line] += f.what + "\n"
	}
	want := regexp.MustCompile(`// want "(.*)"$`)
	for i, line := range strings.Split(string(src), "\n") {
		switch m := want.FindStringSubmatch(line); {
		case m == nil && found[i+1] != "":
			t.Errorf("line %d is reported: %s", i+1, found[i+1])
		case m != nil && !strings.Contains(found[i+1], strings.ReplaceAll(m[1], `\"`, `"`)):
			t.Errorf("line %d: %q is not reported, but: %s", i+1, m[1], found[i+1])
		}
	}
}

type finding struct {
	at   token.Pos
	what string
}

// findings applies the rules to one file. Packages are told by their imports,
// which is enough without dot imports; those are a finding themselves.
func findings(file *ast.File) (out []finding) {
	report := func(n ast.Node, format string, args ...any) {
		out = append(out, finding{n.Pos(), fmt.Sprintf(format, args...)})
	}
	imports := map[string]string{} // name here → path
	for _, i := range file.Imports {
		path, _ := strconv.Unquote(i.Path.Value)
		name := path[strings.LastIndexByte(path, '/')+1:]
		if i.Name != nil {
			name = i.Name.Name
		}
		if name == "." {
			report(i, "%s is imported with a dot", path)
		}
		if path == "log" || path == "log/slog" {
			report(i, "%s is imported: the logger comes with the context", path)
		}
		imports[name] = path
	}
	// of names what a selector means, e.g. zap.L.
	of := func(e ast.Expr) string {
		s, ok := e.(*ast.SelectorExpr)
		if !ok {
			return ""
		}
		id, ok := s.X.(*ast.Ident)
		if !ok || imports[id.Name] == "" {
			return ""
		}
		path := imports[id.Name]
		return path[strings.LastIndexByte(path, '/')+1:] + "." + s.Sel.Name
	}
	forbidden := map[string]string{
		"context.Background": "starts a context that is not the caller's", "context.TODO": "starts a context that is not the caller's",
		"zap.Logger": "is kept: the logger comes with the context", "zap.SugaredLogger": "is kept: the logger comes with the context",
		"zapcore.Core": "is kept: the logger comes with the context",
		"logging.New":  "makes another logger", "logging.Into": "makes another logger",
		"os.Stderr": "is written to beside the log", "os.Stdout": "is written to beside the log",
		"fmt.Print": "writes beside the log", "fmt.Println": "writes beside the log", "fmt.Printf": "writes beside the log",
	}
	made := regexp.MustCompile(`^zap\.(L|S|New\w*|Must|ReplaceGlobals|RedirectStdLog\w*|Config)$`)
	fine := map[ast.Node]bool{} // calls of logging.From that are used at once
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			name := of(n)
			if why := forbidden[name]; why != "" {
				report(n, "%s %s", source(n), why)
			} else if made.MatchString(name) {
				report(n, "%s makes another logger", name)
			}
			fine[n.X] = true // logging.From(ctx).Info
		case *ast.AssignStmt:
			for i, r := range n.Rhs {
				if _, local := n.Lhs[min(i, len(n.Lhs)-1)].(*ast.Ident); local && n.Tok == token.DEFINE {
					fine[r] = true
				}
			}
		case *ast.CallExpr:
			if of(n.Fun) == "logging.From" && !fine[n] {
				report(n, "logging.From is kept or passed on: pass the context")
			}
			if id, ok := n.Fun.(*ast.Ident); ok && (id.Name == "println" || id.Name == "print") {
				report(n, "%s writes beside the log", id.Name)
			}
			if of(n.Fun) == "zap.String" && len(n.Args) == 2 && of(n.Args[0]) == "logging.KeyComponent" {
				if lit, ok := n.Args[1].(*ast.BasicLit); ok {
					if c, _ := strconv.Unquote(lit.Value); !slices.Contains(Components(), c) {
						report(n, "component %q has no level: see logging.Components", c)
					}
				}
			}
		case *ast.FuncDecl:
			// Who is given an event knows its case, and its lines are about both.
			if !slices.ContainsFunc(n.Type.Params.List, func(p *ast.Field) bool {
				star, ok := p.Type.(*ast.StarExpr)
				return ok && of(star.X) == "event.Event"
			}) || n.Body == nil {
				break
			}
			ast.Inspect(n.Body, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || len(call.Args) == 0 {
					return true
				}
				method, _ := call.Fun.(*ast.SelectorExpr)
				if of(call.Fun) != "logging.From" && (method == nil || method.Sel.Name != "Log" || len(call.Args) < 3) {
					return true
				}
				in, _ := call.Args[0].(*ast.CallExpr)
				if in == nil || fmt.Sprint(in.Fun) != "inCases" {
					report(call, "a line about an event without inCases: it would lack the case_id")
				}
				return true
			})
		case *ast.StructType:
			for _, f := range n.Fields.List {
				if of(f.Type) == "context.Context" {
					report(f, "context.Context in a struct: it is not the caller's")
				}
			}
		case *ast.CompositeLit:
			if of(n.Type) != "http.Server" {
				break
			}
			var missing []string
			for _, field := range []string{"BaseContext", "ErrorLog"} {
				if !slices.ContainsFunc(n.Elts, func(e ast.Expr) bool {
					kv, ok := e.(*ast.KeyValueExpr)
					return ok && fmt.Sprint(kv.Key) == field
				}) {
					missing = append(missing, field)
				}
			}
			if len(missing) > 0 {
				report(n, "http.Server without BaseContext and ErrorLog: its requests and its errors would lose the context (%s)", strings.Join(missing, ", "))
			}
		}
		return true
	})
	return out
}

func source(s *ast.SelectorExpr) string { return fmt.Sprint(s.X) + "." + s.Sel.Name }
