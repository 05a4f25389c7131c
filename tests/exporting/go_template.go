// Writes conversations by a Go template, as Ollama does (template/template.go there): .Messages with .Role and .Content.
// stdin: [{"template": ..., "chats": [[{"Role": ..., "Content": ...}]]}]; stdout: the texts, or {"error": ...}, as JSON.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

type job struct {
	Template string
	Chats    [][]message
}

func written(one job) any {
	parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	texts := []string{}
	for _, chat := range one.Chats {
		var out bytes.Buffer
		if err := parsed.Execute(&out, map[string]any{"Messages": chat}); err != nil {
			return map[string]string{"error": err.Error()}
		}
		texts = append(texts, out.String())
	}
	return texts
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	answers := []any{}
	for _, one := range jobs {
		answers = append(answers, written(one))
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
