package tests

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// Prometheus' own tool takes the alerting rules, the queries of the dashboard and the metrics of a mount; and
// each alert is raised by what it is for, and by nothing else.
func TestAlerts(t *testing.T) {
	needFUSE(t)
	needTool(t, "promtool")
	dir := t.TempDir()
	promtool := func(stdin string, args ...string) {
		t.Helper()
		c := exec.Command("promtool", args...)
		c.Dir, c.Stdin = dir, strings.NewReader(stdin)
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("promtool %q: %v\n%s", args, err, out)
		}
	}
	for from, to := range map[string]string{"../docs/deploy/alerts.yml": "alerts.yml", "testdata/alerts.yml": "tests.yml"} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, to), b)
	}
	promtool("", "check", "rules", "alerts.yml")
	promtool("", "test", "rules", "tests.yml")

	queries := queriesOf(t, "../docs/deploy/dashboard.json")
	if len(queries) < 10 {
		t.Errorf("the dashboard has %d queries only", len(queries))
	}
	type rule struct{ Record, Expr string }
	type group struct {
		Name  string
		Rules []rule
	}
	g := group{Name: "dashboard"}
	for i, q := range queries {
		g.Rules = append(g.Rules, rule{fmt.Sprint("query", i), strings.ReplaceAll(q, "$__rate_interval", "5m")})
	}
	b, err := yaml.Marshal(map[string][]group{"groups": {g}})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "dashboard.yml"), b)
	promtool("", "check", "rules", "dashboard.yml")

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	m := newVolume(t, "--metrics-addr", l.Addr().String())
	write(t, m.path("f"), noise(1000))
	_, text := get(t, "http://"+l.Addr().String()+"/metrics")
	promtool(text, "check", "metrics")
}

// queriesOf returns the queries of a dashboard, which must have what Grafana needs of each panel.
func queriesOf(t *testing.T, path string) (out []string) {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Title, UID    string
		SchemaVersion int
		Panels        []struct {
			ID          int
			Title, Type string
			GridPos     struct{ H, W, X, Y int }
			Targets     []struct{ Expr, RefID string }
		}
	}
	if err := json.Unmarshal(b, &dashboard); err != nil {
		t.Fatal(err)
	}
	if dashboard.Title == "" || dashboard.UID == "" || dashboard.SchemaVersion < 30 {
		t.Errorf("not a dashboard: %+v", dashboard)
	}
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if p.ID == 0 || ids[p.ID] || p.Title == "" || p.Type == "" || p.GridPos.H < 1 || p.GridPos.W < 1 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("the panel %q cannot be shown: %+v", p.Title, p)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			if target.RefID == "" {
				t.Errorf("a query of %q has no refId", p.Title)
			}
			out = append(out, target.Expr)
		}
	}
	return out
}
